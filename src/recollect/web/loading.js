/**
 * What the page reads of the server: the list, and the conversation that is open, at the message where one is.
 *
 * What a person does there is in `actions.js`, what happens elsewhere in `live.js`; both have it read anew.
 */

import { batch } from "@preact/signals";
import { ApiError, call } from "./api.js";
import * as state from "./state.js";
import { EMPTY, newestBelow, readTree } from "./tree.js";

/** @typedef {import("./types").Conversation} Conversation */

/** Messages of a tree that are read at once: most that the server gives, since each page reads the whole tree. */
const TREE_PAGE = 2000;

/** @param {string} id @returns {string} The address of a conversation, or of a branch. */
export const at = (id) => `/v1/conversations/${encodeURIComponent(id)}`;

export async function readModels() {
  state.models.value = (await call("GET", "/v1/models")).data;
}

/** Read the newest conversations anew; older ones stay in the list as they were. */
export async function readConversations() {
  const page = await call("GET", "/v1/conversations?limit=50");
  const known = state.conversations.value;
  const last = known.findIndex((one) => one.id === page.data.at(-1)?.id);
  const older = page.has_more && last >= 0 ? known.slice(last + 1) : [];
  batch(() => {
    state.conversations.value = [...page.data, ...older];
    if (older.length === 0) state.hasMore.value = page.has_more;
  });
  await readApart();
}

/** Read what the list would say of the open conversation, where the list ends before it. */
async function readApart() {
  const id = state.current.value;
  if (id === null || state.conversations.value.some((one) => one.id === id)) return;
  const one = await call("GET", at(id));
  if (state.current.value === id) state.apart.value = one;
}

/** Read conversations that are older than the last one in the list. */
export async function readOlderConversations() {
  const last = state.conversations.value.at(-1)?.id ?? "";
  const page = await call("GET", `/v1/conversations?limit=50&after=${encodeURIComponent(last)}`);
  batch(() => {
    const known = new Set(state.conversations.value.map((one) => one.id));
    const more = page.data.filter((/** @type {Conversation} */ one) => !known.has(one.id));
    state.conversations.value = [...state.conversations.value, ...more];
    state.hasMore.value = page.has_more;
  });
}

/**
 * @typedef {object} Reads Of the open conversation's tree.
 * @property {Promise<void>} last The last one that has begun.
 * @property {Promise<void> | null} next The one that waits for it.
 * @property {string} [item] At which message the conversation is opened.
 */

/** @type {Reads} */
let reads = { last: Promise.resolve(), next: null };

/** How many milliseconds the last read of a whole tree took. */
export let readMs = 0;

/**
 * Read the open conversation's tree anew, and stay where one is, if that is still there.
 *
 * One read at a time, so that an older one never hides what a newer one has found; all who ask during a
 * read share the next one.
 *
 * @returns {Promise<void>}
 */
export function readTreeAgain() {
  const mine = reads;
  const begin = () => {
    mine.next = null;
    mine.last = readOpenTree(mine);
    return mine.last;
  };
  mine.next ??= mine.last.then(begin, begin);
  return mine.next;
}

/** @param {Reads} mine It ends where another conversation has been opened since. */
async function readOpenTree(mine) {
  const id = state.current.value;
  const isOpen = () => reads === mine && state.current.value === id;
  if (id === null || !isOpen()) return;
  const begun = performance.now();
  let body;
  try {
    body = await wholeTree(id, isOpen);
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) throw error;
    forgetConversation(id);
    return;
  }
  if (!isOpen()) return;
  readMs = performance.now() - begun;
  const tree = readTree(body);
  batch(() => {
    state.tree.value = tree;
    const isThere = tree.nodes.has(state.selected.value ?? "");
    if (state.isOpening.value) {
      state.isOpening.value = false;
      if (!isThere) select(opensAt(tree, mine.item));
    } else if (state.selected.value !== null && !isThere) {
      state.selected.value = tree.tips[state.branch.value] ?? tree.tips.main ?? null;
    }
  });
}

/**
 * @param {import("./types").Tree} tree
 * @param {string | undefined} item
 * @returns {string | null} The message at which a conversation is opened.
 */
function opensAt(tree, item) {
  const newest = tree.roots.length ? newestBelow(tree, /** @type {string} */ (tree.roots.at(-1))) : null;
  const holder = item && [...tree.nodes.values()].find((node) => node.id === item || node.items.includes(item));
  return holder ? holder.id : (tree.tips.main ?? newest);
}

/**
 * Read all pages of a tree; of one that is being opened the first is shown while the others are read.
 *
 * @param {string} id
 * @param {() => boolean} isWanted Asked before each page but the first.
 * @returns {Promise<import("./types").ApiTree>}
 */
async function wholeTree(id, isWanted) {
  const first = await call("GET", `${at(id)}/tree?limit=${TREE_PAGE}`);
  if (first.has_more && state.isOpening.value && isWanted()) state.tree.value = readTree(first);
  for (let page = first; page.has_more && page.last_id && isWanted(); ) {
    page = await call("GET", `${at(id)}/tree?limit=${TREE_PAGE}&after=${encodeURIComponent(page.last_id)}`);
    first.nodes.push(...page.nodes);
    first.tips = both(first.tips, page.tips);
    first.checkpoints = both(first.checkpoints, page.checkpoints);
  }
  return first;
}

/**
 * @template V
 * @param {Record<string, V>} one
 * @param {Record<string, V>} two
 * @returns {Record<string, V>} With all names, one that means something to JavaScript (`__proto__`) among them.
 */
const both = (one, two) => Object.fromEntries([...Object.entries(one), ...Object.entries(two)]);

/**
 * Open a conversation where it stands, or at one of its messages.
 *
 * @param {string} id
 * @param {string} [item]
 */
export async function open(id, item) {
  const mine = { last: Promise.resolve(), next: null, item };
  const before = state.current.value;
  reads = mine;
  batch(() => {
    state.current.value = id;
    state.isOpening.value = true;
    state.tree.value = EMPTY;
    state.selected.value = null;
    state.branch.value = "main";
    state.folded.value = state.aside.value = new Set();
    state.editing.value = null;
    state.panel.value = "";
    state.compared.value = [null, null];
  });
  // The browser's Back leads to the conversation that was open before.
  if (location.hash.slice(1) !== id) history[before === null ? "replaceState" : "pushState"](null, "", `#${id}`);
  try {
    await readTreeAgain();
  } catch (error) {
    if (reads === mine && state.current.value === id) close();
    throw error;
  }
  await readApart();
}

/**
 * Go to a message; what is folded on the way there is unfolded, so that one sees it.
 *
 * @param {string | null} id
 */
export function select(id) {
  batch(() => {
    state.selected.value = id;
    const way = state.path.value.map((node) => node.id);
    state.aside.value = without(state.aside.value, way);
    state.folded.value = without(state.folded.value, way.slice(0, -1));
    state.editing.value = null;
    if (state.goingBranch.value !== null) state.branch.value = state.goingBranch.value;
  });
}

/** @param {Set<string>} all @param {string[]} some @returns {Set<string>} The same set where none of them is in it. */
function without(all, some) {
  const gone = new Set(some.filter((one) => all.has(one)));
  return gone.size ? new Set([...all].filter((one) => !gone.has(one))) : all;
}

/**
 * Go along with a branch that has grown: a question on it that is being edited stays open.
 *
 * @param {string | null} id Its newest message.
 */
export function follow(id) {
  const edited = state.editing.value;
  batch(() => {
    select(id);
    state.editing.value = edited;
  });
}

/**
 * Forget a conversation that is no more, whoever deleted it.
 *
 * @param {string} id
 */
export function forgetConversation(id) {
  state.conversations.value = state.conversations.value.filter((one) => one.id !== id);
  if (state.current.value !== id) return;
  close();
  state.tell("This conversation is no longer there.", "info");
}

/** Show no conversation. */
function close() {
  batch(() => {
    state.current.value = null;
    state.isOpening.value = false;
    state.tree.value = EMPTY;
    state.selected.value = null;
    state.panel.value = "";
  });
  history.replaceState(null, "", "/");
}

/**
 * @param {string} query
 * @returns {Promise<{conversation: string, item: string, role: string, snippet: string}[]>}
 */
export async function search(query) {
  return (await call("GET", `/v1/search?limit=50&query=${encodeURIComponent(query)}`)).data;
}
