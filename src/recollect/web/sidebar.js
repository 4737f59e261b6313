/** The list of conversations, with search. */

import { useEffect, useState } from "preact/hooks";
import * as state from "./state.js";
import * as actions from "./actions.js";
import { open, readOlderConversations, search } from "./loading.js";
import { Icon, IconButton, html } from "./widgets.js";

/** How long one has stopped typing before a search is made, in milliseconds. */
const PAUSE = 250;

/** @param {number} seconds Since 1970. */
function when(seconds) {
  const date = new Date(seconds * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString([], { day: "numeric", month: "short" });
}

/** @param {string} id @param {string} [item] */
function go(id, item) {
  state.shown.value = "path";
  void actions.attempt(() => open(id, item));
}

export function Sidebar() {
  const [query, setQuery] = useState("");
  const [hits, setHits] = useState(/** @type {any[] | null} */ (null));
  useEffect(() => {
    if (!query.trim()) return setHits(null);
    let isAsked = true;
    const timer = setTimeout(async () => {
      const found = (await actions.attempt(() => search(query))) ?? [];
      if (isAsked) setHits(found);
    }, PAUSE);
    return () => {
      isAsked = false;
      clearTimeout(timer);
    };
  }, [query]);
  return html`<aside class="sidebar" aria-label="Conversations">
    <div class="brand">
      <img src="/web/icon.svg" alt="" width="26" height="26" />
      <h1>recollect</h1>
      ${state.isLive.value !== null &&
      html`<i class=${state.isLive.value ? "live on" : "live"} title=${state.isLive.value ? "Live" : "Connecting again"}></i>`}
      <span class="grow"></span>
      <${IconButton} icon="plus" label="New conversation" onClick=${() => actions.once("begin", actions.begin)} />
    </div>
    <label class="search">
      <${Icon} name="search" />
      <input type="search" placeholder="Search" aria-label="Search what was said" value=${query} onInput=${(/** @type {any} */ event) => setQuery(event.target.value)} />
    </label>
    ${hits ? html`<${Hits} hits=${hits} />` : html`<${List} />`}
  </aside>`;
}

function List() {
  return html`<ul class="list">
    ${state.conversations.value.map(
      (one) => html`<li key=${one.id}>
        <button
          type="button"
          class=${one.id === state.current.value ? "entry chosen" : "entry"}
          aria-current=${one.id === state.current.value ? "true" : undefined}
          onClick=${() => go(one.id)}
        >
          <span class="entry-title">${state.titleOf(one)}</span>
          <span class="entry-when">${when(one.created_at)}</span>
        </button>
      </li>`,
    )}
    ${state.hasMore.value &&
    html`<li><button type="button" class="earlier" onClick=${() => actions.attempt(readOlderConversations)}>Older ones</button></li>`}
  </ul>`;
}

/** @param {{hits: any[]}} props */
function Hits({ hits }) {
  if (hits.length === 0) return html`<p class="hint">Nothing was found.</p>`;
  return html`<ul class="list">
    ${hits.map(
      (one) => html`<li key=${one.item}>
        <button type="button" class="entry hit" onClick=${() => go(one.conversation, one.item)}>
          <span class="entry-title">${one.snippet}</span>
          <span class="entry-when">${when(one.created_at)}</span>
        </button>
      </li>`,
    )}
  </ul>`;
}
