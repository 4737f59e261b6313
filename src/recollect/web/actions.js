/**
 * What a person can do, as calls of the API: each asks, then reads anew what has changed.
 */

import { batch } from "@preact/signals";
import { ApiError, call, stream } from "./api.js";
import { at, follow, forgetConversation, open, readConversations, readTreeAgain, select } from "./loading.js";
import * as state from "./state.js";

/** @typedef {import("./types").TreeNode} TreeNode */

const TITLE_CHARACTERS = 60;
const NAME_CHARACTERS = 24;

/** @returns {string} The conversation that is open. */
function here() {
  if (state.current.value === null) throw new Error("No conversation is open.");
  return state.current.value;
}

/** @param {string} name A branch, as the API addresses it. */
const idOf = (name) => (name === "main" ? here() : `${here()}.${name}`);

/**
 * Do something, and tell the person where it fails.
 *
 * @template T
 * @param {() => Promise<T>} action
 * @returns {Promise<T | undefined>}
 */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError")) state.tell(error);
    return undefined;
  }
}

/** What `once` does now. @type {Set<string>} */
const underway = new Set();

/**
 * Attempt something unless the same is under way: the second of two quick clicks asks for nothing new.
 *
 * @param {string} what Names it.
 * @param {() => Promise<unknown>} action
 */
export async function once(what, action) {
  if (underway.has(what)) return;
  underway.add(what);
  await attempt(action);
  underway.delete(what);
}

/** Begin a conversation, with the system prompt of the settings where there is one. */
export async function begin() {
  const system = state.settings.value.system.trim();
  const items = system ? [{ type: "message", role: "system", content: system }] : [];
  const made = await call("POST", "/v1/conversations", { items, metadata: {} });
  await Promise.all([readConversations(), open(made.id)]);
  state.shown.value = "path";
}

/** @param {string} title */
export async function rename(title) {
  await call("POST", at(here()), { metadata: { ...state.opened.value?.metadata, title } });
  await readConversations();
}

/** @param {string} id */
export async function deleteConversation(id) {
  await call("DELETE", at(id));
  forgetConversation(id);
  await readConversations();
}

/**
 * @param {string[]} texts
 * @returns {string[]} A name for a branch for each, all of them different.
 */
export function namesFor(texts) {
  /** @type {string[]} */
  const names = [];
  for (const text of texts) names.push(nameFor(text, names));
  return names;
}

/**
 * @param {string} text
 * @param {string[]} [more] Names that are taken besides those of branches.
 * @returns {string} A name for a branch: words of what is asked there.
 */
export function nameFor(text, more = []) {
  let stem = "";
  for (const word of text.toLowerCase().normalize("NFKD").match(/[a-z0-9]+/g) ?? []) {
    if (stem && stem.length + word.length >= NAME_CHARACTERS) break;
    stem = (stem ? `${stem}-${word}` : word).slice(0, NAME_CHARACTERS);
  }
  stem ||= "branch";
  const taken = state.tree.value.tips;
  for (let number = 1; ; number += 1) {
    const name = number === 1 ? stem : `${stem}-${number}`;
    if (!Object.hasOwn(taken, name) && !more.includes(name)) return name;
  }
}

/**
 * Begin a branch at a message, or before one.
 *
 * @param {{at?: string | null, before?: string}} where
 * @param {string} name
 * @returns {Promise<string>} The branch's id.
 */
async function forkAt(where, name) {
  const body = where.before ? { before: where.before, name } : { at: where.at, name };
  return (await call("POST", `${at(here())}/fork`, body)).id;
}

/**
 * Begin a branch with a name of words; another window may have taken the first one since the tree was read.
 *
 * @param {{at?: string | null, before?: string}} where
 * @param {string} text
 */
async function branchOff(where, text) {
  let name = nameFor(text);
  try {
    return { name, id: await forkAt(where, name) };
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 409)) throw error;
  }
  await readTreeAgain();
  name = nameFor(text);
  return { name, id: await forkAt(where, name) };
}

/** @param {string} name */
export async function fork(name) {
  await forkAt({ at: state.selected.value }, name);
  state.branch.value = name;
  await readTreeAgain();
}

/**
 * @param {{continues?: boolean}} [how]
 * @returns {Record<string, unknown>} What a request says of its reply.
 */
function wishes(how = {}) {
  const { model, temperature, top_p, max_output_tokens, seed, tools } = state.settings.value;
  /** @param {string} text */
  const number = (text) => (text.trim() === "" ? undefined : Number(text));
  return {
    model: model || undefined,
    temperature: number(temperature),
    top_p: number(top_p),
    max_output_tokens: number(max_output_tokens),
    seed: how.continues ? undefined : number(seed),
    tools: tools.trim() === "" ? undefined : JSON.parse(tools),
  };
}

/** How many replies were asked for here. */
let made = 0;

/** How often, and after how many milliseconds, a stopped reply is looked for in the tree. */
const LOOKS = 12;
const LOOK_MS = 200;

/**
 * Wait until a reply that was stopped is kept, which the server does once it sees that nobody listens.
 *
 * @param {string} conversation
 * @param {string} name The branch.
 * @param {string | null} parent What it comes after.
 */
async function stoppedReply(conversation, name, parent) {
  for (let look = 0; look < LOOKS && state.current.value === conversation; look += 1) {
    await readTreeAgain();
    const tip = state.tree.value.tips[name] ?? null;
    if (tip !== parent && state.tree.value.nodes.get(tip ?? "")?.role !== "user") return;
    await new Promise((done) => setTimeout(done, LOOK_MS));
  }
}

/**
 * Have a branch go on, and show its reply while it is generated.
 *
 * @param {string} id The branch as the API addresses it.
 * @param {string} name
 * @param {string | null} parent What the question, or the reply, comes after.
 * @param {unknown} input
 * @param {{question?: string | null, continues?: boolean, more?: Record<string, unknown>}} [how]
 */
async function goOn(id, name, parent, input, { question = null, continues = false, more = {} } = {}) {
  const conversation = here();
  const control = new AbortController();
  made += 1;
  const reply = `own-${made}`;
  const follows = () => state.current.value === conversation && state.selected.value === parent;
  state.setPending(reply, {
    ...{ id: reply, conversation, parent, branch: name, question, text: "", reasoning: "" },
    ...{ computed: 0, tokens: 0, isOwn: true },
    stop: () => {
      state.setPending(reply, { stop: null });
      control.abort();
    },
  });
  let failure = null;
  const body = { ...wishes({ continues }), ...more, conversation: id, input, stream: true };
  try {
    await stream(
      "/v1/responses",
      body,
      (event) => {
        if (event.type === "response.output_text.delta") state.grown.add(reply, event.delta);
        else if (event.type === "response.reasoning_text.delta") state.grown.add(reply, "", event.delta);
        else if (event.type === "response.failed") {
          failure = new Error(event.response.error.message);
        }
      },
      control.signal,
    );
  } finally {
    if (state.current.value === conversation) {
      await attempt(() => (control.signal.aborted ? stoppedReply(conversation, name, parent) : readTreeAgain()));
    }
    batch(() => {
      if (follows()) follow(state.tree.value.tips[name] ?? parent);
      state.setPending(reply, null);
    });
    void attempt(readConversations);
  }
  if (failure) throw failure;
}

/**
 * Ask where one stands: on the branch that ends there, or on a new one.
 *
 * @param {string} text Stays in the field where the server did not take it.
 */
export async function ask(text) {
  state.draft.value = "";
  await keeping(text, () => askHere(text));
}

/**
 * Ask something; where the server did not take the question, its words are in the field again.
 *
 * @param {string} text
 * @param {() => Promise<void>} action
 */
async function keeping(text, action) {
  const times = () =>
    [...state.tree.value.nodes.values()].filter((node) => node.role === "user" && node.text === text).length;
  const before = times();
  try {
    await action();
  } catch (error) {
    if (times() <= before) state.draft.value = [text, state.draft.value].filter(Boolean).join("\n\n");
    throw error;
  }
}

/** @param {string} text */
async function askHere(text) {
  if (state.current.value === null) await begin();
  const parent = state.selected.value;
  const isFirst = state.path.value.every((node) => node.role === "system");
  const isEmpty = state.goingBranch.value === null && parent === null;
  const { name, id } = isEmpty ? { name: "main", id: here() } : await standing(text);
  if (isFirst && !titleIsSet()) void attempt(() => rename(titleFor(text)));
  await goOn(id, name, parent, text, { question: text });
}

/** @param {string} text @returns {string} Its first words. */
function titleFor(text) {
  const line = text.trim().replace(/\s+/g, " ");
  if (line.length <= TITLE_CHARACTERS) return line;
  const cut = line.slice(0, TITLE_CHARACTERS);
  return `${cut.slice(0, cut.lastIndexOf(" ") > 0 ? cut.lastIndexOf(" ") : undefined)}…`;
}

function titleIsSet() {
  return Boolean(state.opened.value?.metadata.title);
}

/**
 * Ask another question in place of one; what was said after that one stays in its branch.
 *
 * @param {TreeNode} node
 * @param {string} text
 */
export async function edit(node, text) {
  const { name, id } = await branchOff({ before: node.id }, text);
  batch(() => {
    state.editing.value = null;
    state.branch.value = name;
    state.selected.value = node.parent;
  });
  void attempt(() => keeping(text, () => goOn(id, name, node.parent, text, { question: text })));
}

/**
 * Have a reply generated once more, beside the one that is there.
 *
 * @param {TreeNode} reply
 */
export async function regenerate(reply) {
  const asked = state.tree.value.nodes.get(reply.parent ?? "");
  if (!asked) return;
  const { name, id } = await branchOff({ at: asked.id }, `again ${asked.text}`);
  batch(() => {
    state.branch.value = name;
    state.selected.value = asked.id;
  });
  // Greedy decoding would say the same again.
  const { temperature, seed } = state.settings.value;
  const more = {
    ...(temperature.trim() === "" ? { temperature: 0.8 } : {}),
    ...(seed.trim() === "" ? { seed: crypto.getRandomValues(new Uint32Array(1))[0] } : {}),
  };
  void attempt(() => goOn(id, name, asked.id, [], { more }));
}

/**
 * Go on with a reply that was cut.
 *
 * @param {TreeNode} reply
 */
export async function carryOn(reply) {
  const { name, id } = await standing("longer");
  await goOn(id, name, reply.id, [], { continues: true });
}

/**
 * Try several ways on from what is shown, all in one batch, each on a branch of its own.
 *
 * @param {{name: string, prompt?: string, temperature?: number, seed?: number}[]} ways
 * @param {AbortSignal} stop
 * @param {(event: any) => void} onEvent
 */
export async function tryWays(ways, stop, onEvent) {
  if (state.current.value === null) await begin();
  const conversation = here();
  const from = state.selected.value;
  const { tools: _, ...how } = wishes();
  const body = { ...how, item: from ?? undefined, branches: ways, stream: true };
  try {
    await stream(`${at(conversation)}/explore`, body, onEvent, stop);
  } finally {
    if (state.current.value === conversation) {
      await attempt(readTreeAgain);
      if (Object.hasOwn(state.tree.value.tips, ways[0].name)) state.branch.value = ways[0].name;
    }
  }
}

/** Have the branch of what is shown stand there, so that it goes on from there. */
export async function rewind() {
  await call("POST", `${at(idOf(state.branch.value))}/rewind`, { to: state.selected.value });
  await readTreeAgain();
}

/**
 * Name the place that is shown, and keep its KV on disk; where no branch stands, one does for as long.
 *
 * @param {string} name
 */
export async function checkpoint(name) {
  const begun = state.goingBranch.value === null ? await branchOff({ at: state.selected.value }, name) : null;
  let kept;
  try {
    kept = await call("POST", `${at(begun?.id ?? idOf(/** @type {string} */ (state.goingBranch.value)))}/checkpoint`, { name });
  } finally {
    if (begun) await attempt(() => deleteBranch(begun.name));
  }
  const { kv } = kept;
  const told = kv.kept ? `${kv.tokens} tokens stay on disk.` : `Its cache is not kept: ${kv.reason}.`;
  state.tell(`Checkpoint ${name}. ${told}`, "info");
  await readTreeAgain();
}

/** @param {string} name */
export async function deleteCheckpoint(name) {
  await call("DELETE", `${at(here())}/checkpoints/${encodeURIComponent(name)}`);
  await readTreeAgain();
}

const wordsHere = () => state.path.value.at(-1)?.text ?? "branch";

/**
 * Return the branch that goes on from what is shown; one begins where none does.
 *
 * @param {string} text Names the branch that begins.
 * @returns {Promise<{name: string, id: string}>}
 */
async function standing(text) {
  const name = state.goingBranch.value;
  if (name !== null) return { name, id: idOf(name) };
  const begun = await branchOff({ at: state.selected.value }, text);
  state.branch.value = begun.name;
  return begun;
}

/**
 * Take a message out of the branch that is shown.
 *
 * @param {TreeNode} node
 */
export async function deleteItem(node) {
  const { name, id } = await standing(wordsHere());
  await call("DELETE", `${at(id)}/items/${encodeURIComponent(node.items[0] ?? node.id)}`);
  await readTreeAgain();
  select(state.tree.value.tips[name] ?? null);
}

/**
 * @param {string} from
 * @param {string} to
 */
export async function renameBranch(from, to) {
  await call("POST", `${at(here())}/branches/${encodeURIComponent(from)}`, { name: to });
  if (state.branch.value === from) state.branch.value = to;
  await readTreeAgain();
}

/** @param {string} name */
export async function deleteBranch(name) {
  await call("DELETE", `${at(here())}/branches/${encodeURIComponent(name)}`);
  await readTreeAgain();
}

/** Save the open conversation as a file that `recollect conversations import` reads, too. */
export async function exportFile() {
  const content = await call("GET", `${at(here())}/export`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  link.download = `${here()}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** @param {File} file */
export async function importFile(file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is no exported conversation: it is not JSON.`);
  }
  if (content?.format === undefined) throw new Error(`${file.name} is no exported conversation.`);
  const made = await call("POST", "/v1/conversations/import", { file: content });
  await readConversations();
  await open(made.id);
}
