/**
 * What happens elsewhere: another window, the terminal or an agent says something, and it appears here.
 *
 * Events say what has changed; what is shown is read anew, soon after, and once for many of them.
 */

import { listen } from "./api.js";
import * as state from "./state.js";
import { attempt } from "./actions.js";
import { follow, forgetConversation, readConversations, readMs, readTreeAgain } from "./loading.js";

/** Milliseconds in which events are gathered before what changed is read. */
const GATHER = 200;
/** The same for where KV is, which changes with every pass. */
const GATHER_KV = 3000;

/** Which reply asked for here an event's reply is: this page knows its own by the ids of responses. @type {Map<string, string>} */
const own = new Map();

/** For how many times as long as a tree takes to be read the server is then left alone with it. */
const REST = 3;

/** @type {AbortController | null} */
let control = null;
/** @type {Map<string, ReturnType<typeof setTimeout>>} */
const due = new Map();

/**
 * @param {string} what
 * @param {() => Promise<unknown>} read
 * @param {number} [wait]
 */
function soon(what, read, wait = GATHER) {
  if (due.has(what)) return;
  due.set(
    what,
    setTimeout(() => {
      due.delete(what);
      void attempt(read);
    }, wait),
  );
}

function readOpen() {
  if (state.current.value === null) return;
  soon("tree", async () => {
    // Who looks at the end of a branch goes along with it.
    const before = state.tree.value.tips[state.branch.value];
    const follows = before === state.selected.value && state.growing.value.every((one) => !one.isOwn);
    await readTreeAgain();
    const now = state.tree.value.tips[state.branch.value];
    if (follows && state.selected.value === before && now !== undefined && now !== before) follow(now);
  }, Math.max(GATHER, REST * readMs));
}

/**
 * @param {any} event Says that a reply begins.
 * @returns {string | undefined} The reply that was asked for here, if it is that one.
 */
function askedHere(event) {
  for (const one of state.pending.value.values()) {
    const isIt = one.isOwn && one.conversation === event.conversation && one.branch === event.branch;
    if (isIt && ![...own.values()].includes(one.id)) return one.id;
  }
  return undefined;
}

/** @param {any} event */
function begin(event) {
  if (state.trying.has(event.branch)) return;
  const mine = askedHere(event);
  if (mine !== undefined) {
    own.set(event.reply, mine);
    return;
  }
  state.setPending(event.reply, {
    ...{ id: event.reply, conversation: event.conversation, parent: event.parent, branch: event.branch },
    ...{ question: null, text: "", reasoning: "", computed: 0, tokens: 0, isOwn: false, stop: null },
  });
}

/** Forget replies of others, of which nobody will be told that they have ended. */
function forget() {
  own.clear();
  for (const one of state.pending.value.values()) if (!one.isOwn) state.setPending(one.id, null);
}

/** @param {any} event */
function onEvent(event) {
  const isHere = event.conversation === state.current.value;
  const known = state.pending.value.get(event.reply);
  switch (event.type) {
    case "events.lost":
      forget();
      soon("list", readConversations);
      readOpen();
      break;
    case "conversation.deleted":
      forgetConversation(event.conversation);
      soon("list", readConversations);
      break;
    case "conversation.created":
    case "conversation.updated":
      soon("list", readConversations);
      break;
    case "message.created":
    case "branch.moved":
    case "branch.deleted":
    case "checkpoint.created":
    case "checkpoint.deleted":
      if (isHere) readOpen();
      break;
    case "kv.warm":
    case "kv.evicted":
      if (state.pending.value.size === 0 && state.current.value !== null) soon("kv", readTreeAgain, Math.max(GATHER_KV, REST * readMs));
      break;
    case "reply.started":
      if (isHere) begin(event);
      break;
    case "reply.progress":
      state.setPending(own.get(event.reply) ?? event.reply, { computed: event.computed, tokens: event.tokens });
      break;
    case "reply.delta":
      if (known) state.grown.add(event.reply, event.text ?? "", event.reasoning ?? "");
      break;
    case "reply.completed":
      own.delete(event.reply);
      if (known) state.setPending(event.reply, null);
      if (isHere) readOpen();
      soon("list", readConversations);
      break;
  }
}

/** The id of the last event that came. */
let last = "";

/**
 * Listen while the page can be seen; a server without events is shown as it is when one asks.
 *
 * A browser has six connections to a server, for all its windows: one that nobody sees takes none, and
 * goes on behind the last event that it was told once it is looked at.
 */
export function live() {
  control?.abort();
  control = null;
  document.addEventListener("visibilitychange", live);
  if (document.hidden) return;
  control = new AbortController();
  listen("/v1/events", last, (event, id) => {
    last = id || last;
    if (event) onEvent(event);
  }, (isOpen) => {
    state.isLive.value = isOpen;
    if (!isOpen) forget();
  }, control.signal).catch(() => {
    state.isLive.value = null;
  });
}
