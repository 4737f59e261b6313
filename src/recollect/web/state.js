/**
 * What the page knows, as signals: a component that reads one is drawn again when it changes.
 *
 * Nothing here asks the server; `loading.js`, `actions.js` and `live.js` do, and write here.
 */

import { batch, computed, signal } from "@preact/signals";
import { EMPTY, branchesAt, pathTo } from "./tree.js";

/**
 * @typedef {import("./types").Tree} Tree
 * @typedef {import("./types").Conversation} Conversation
 * @typedef {import("./types").Pending} Pending
 * @typedef {import("./types").Settings} Settings
 * @typedef {import("./types").Notice} Notice
 */

/** @type {import("@preact/signals").Signal<Conversation[]>} */
export const conversations = signal([]);
/** Whether there are older conversations than those in the list. */
export const hasMore = signal(false);
/** @type {import("@preact/signals").Signal<string | null>} */
export const current = signal(null);
/** The open conversation where it is none of those in the list. @type {import("@preact/signals").Signal<Conversation | null>} */
export const apart = signal(null);
/** What is known of the open conversation besides its tree. */
export const opened = computed(() =>
  [...conversations.value, apart.value].find((one) => one && one.id === current.value),
);
/** @type {import("@preact/signals").Signal<Tree>} */
export const tree = signal(EMPTY);
/** Whether not all of the open conversation has been read yet. */
export const isOpening = signal(false);
/** The message whose path is shown. @type {import("@preact/signals").Signal<string | null>} */
export const selected = signal(null);
/** Which branch goes on where several stand at the same message. */
export const branch = signal("main");
/** Messages below which nothing is drawn. @type {import("@preact/signals").Signal<Set<string>>} */
export const folded = signal(new Set());
/** Messages that are not drawn, nor what is below them: ways that were tried and not kept. @type {import("@preact/signals").Signal<Set<string>>} */
export const aside = signal(new Set());
/** Replies that are being generated, by their ids. @type {import("@preact/signals").Signal<Map<string, Pending>>} */
export const pending = signal(new Map());
/** @type {import("@preact/signals").Signal<{id: string, context_length: number | null}[]>} */
export const models = signal([]);
/** @type {import("@preact/signals").Signal<Notice | null>} */
export const notice = signal(null);
/** Whether events arrive; null: this server has none. @type {import("@preact/signals").Signal<boolean | null>} */
export const isLive = signal(null);
/** Which view is in front of the conversation. @type {import("@preact/signals").Signal<"" | "explore" | "compare" | "memory" | "settings">} */
export const panel = signal("");
/** What a phone shows, which has room for one. @type {import("@preact/signals").Signal<"list" | "tree" | "path">} */
export const shown = signal("path");
/** What is in the question's field. */
export const draft = signal("");
/** Whose question is being edited. @type {import("@preact/signals").Signal<string | null>} */
export const editing = signal(null);
/** The two messages whose paths are compared. @type {import("@preact/signals").Signal<(string | null)[]>} */
export const compared = signal([null, null]);

const SETTINGS = "recollect-settings";

/** @type {Settings} */
const NOTHING_SET = {
  model: "",
  system: "",
  temperature: "",
  top_p: "",
  max_output_tokens: "",
  seed: "",
  tools: "",
};

/** @returns {Settings} */
function storedSettings() {
  try {
    return { ...NOTHING_SET, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  } catch {
    return NOTHING_SET;
  }
}

/** How replies are asked for. */
export const settings = signal(storedSettings());

/** @param {Partial<Settings>} change */
export function set(change) {
  settings.value = { ...settings.value, ...change };
  localStorage.setItem(SETTINGS, JSON.stringify(settings.value));
}

const THEME = "recollect-theme";
/** "light", "dark", or "" as the system has it. */
export const theme = signal(localStorage.getItem(THEME) ?? "");

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const systemIsDark = signal(darkSystem.matches);
darkSystem.addEventListener("change", () => (systemIsDark.value = darkSystem.matches));
export const isDark = computed(() => (theme.value ? theme.value === "dark" : systemIsDark.value));

/** @param {string} value */
export function useTheme(value) {
  theme.value = value;
  localStorage.setItem(THEME, value);
}

export const path = computed(() => pathTo(tree.value, selected.value));

/** The branch that goes on from the chosen message, or null where a new one has to begin. */
export const goingBranch = computed(() => {
  const at = branchesAt(tree.value, selected.value);
  return at.includes(branch.value) ? branch.value : (at[0] ?? null);
});

/**
 * How fast prompts are read here, in tokens a second; null: nothing says.
 *
 * The engine's own measure, from what going on would take, or how fast a prompt was read: the most of
 * these, so that nothing is called saved that was not. The first prompt after a start is slow.
 */
export const readingSpeed = computed(() => {
  let most = 0;
  for (const { usage, goingOn } of tree.value.nodes.values()) {
    if (usage && !usage.read_ahead_tokens) most = Math.max(most, usage.prefill_tps ?? 0);
    if (goingOn?.seconds && !goingOn.on_disk) most = Math.max(most, goingOn.to_compute / goingOn.seconds);
  }
  return most || null;
});

/** The branches that are being tried in this window, which shows them by itself. @type {Set<string>} */
export const trying = new Set();

/** Replies to what is shown, while they are generated. */
export const growing = computed(() =>
  [...pending.value.values()].filter(
    (one) => one.conversation === current.value && one.parent === selected.value,
  ),
);

/** Of the open conversation all that are generated, without their text: new only once one begins or ends. */
export const sprouts = computed(() =>
  JSON.stringify(
    [...pending.value.values()]
      .filter((one) => one.conversation === current.value)
      .map(({ id, parent, branch, question }) => ({ id, parent, branch, question })),
  ),
);

/** Whether there is any. */
export const isGrowing = computed(() => growing.value.length > 0);

/** Milliseconds in which what comes of replies is gathered before it is drawn. */
const DRAW_MS = 50;

/**
 * Gather text that comes token by token, and hand it over at most once in `DRAW_MS`.
 *
 * @template K
 * @param {(key: K, text: string, reasoning: string) => void} put
 */
export function gathered(put) {
  /** @type {Map<K, [string, string]>} */
  const pieces = new Map();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const flush = () => {
    clearTimeout(timer);
    timer = undefined;
    const all = [...pieces];
    pieces.clear();
    batch(() => all.forEach(([key, [text, reasoning]]) => put(key, text, reasoning)));
  };
  return {
    /** @param {K} key @param {string} text @param {string} [reasoning] */
    add(key, text, reasoning = "") {
      const [before, thought] = pieces.get(key) ?? ["", ""];
      pieces.set(key, [before + text, thought + reasoning]);
      timer ??= setTimeout(flush, DRAW_MS);
    },
    /** @param {K} key */
    drop: (key) => pieces.delete(key),
    flush,
  };
}

/** What came of replies since they were drawn. @type {ReturnType<typeof gathered<string>>} */
export const grown = gathered((id, text, reasoning) => {
  const known = pending.value.get(id);
  if (known) setPending(id, { text: known.text + text, reasoning: known.reasoning + reasoning });
});

/**
 * Change a reply that is being generated, or add it, or forget it (null).
 *
 * @param {string} id
 * @param {Partial<Pending> | null} change
 */
export function setPending(id, change) {
  const all = new Map(pending.value);
  const before = all.get(id);
  if (change === null) {
    all.delete(id);
    grown.drop(id);
  } else if (before || change.conversation) all.set(id, /** @type {Pending} */ ({ ...before, ...change }));
  pending.value = all;
}

/**
 * @param {unknown} error
 * @param {Notice["kind"]} [kind]
 */
export function tell(error, kind = "error") {
  notice.value = { kind, text: error instanceof Error ? error.message : String(error) };
}

/**
 * @param {Conversation} one
 * @returns {string} What a conversation is called in the list.
 */
export function titleOf(one) {
  return one.metadata.title || one.name || "New conversation";
}
