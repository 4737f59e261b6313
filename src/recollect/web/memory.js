/** What is kept of all conversations: in memory and on disk, what goes next, and what that has saved. */

import { useEffect, useState } from "preact/hooks";
import * as state from "./state.js";
import { attempt } from "./actions.js";
import { open } from "./loading.js";
import { call } from "./api.js";
import { Bar, IconButton, count, counted, duration, html, size } from "./widgets.js";

/**
 * @typedef {{tokens: number, in_memory: number, on_disk: number, pinned: number}} Held
 * @typedef {{id: string, name: string, branches: Record<string, Held>, checkpoints: string[]}} Kept
 * @typedef {{model: string, block_tokens: number, block_bytes: number, blocks: number, tokens_in_memory: number, evicted_tokens: number}} ModelKv
 * @typedef {{tokens: number, conversation: string | null, branch: string | null}} Next
 * @typedef {{models: ModelKv[], data: Kept[], evicted_next: Next[], saved: {tokens: number, seconds: number}, has_more: boolean, last_id: string | null}} Kv
 */

/** @param {string | null} id */
function nameOf(id) {
  const known = state.conversations.value.find((one) => one.id === id);
  return known ? state.titleOf(known) : (id ?? "");
}

export function Memory() {
  const [kv, setKv] = useState(/** @type {Kv | null} */ (null));
  const [error, setError] = useState("");
  const read = () =>
    void call("GET", "/v1/kv").then(
      (found) => {
        setKv(found);
        setError("");
      },
      (/** @type {Error} */ failed) => setError(failed.message),
    );
  useEffect(read, [state.tree.value]);
  const more = async () => {
    const page = await call("GET", `/v1/kv?after=${encodeURIComponent(kv?.last_id ?? "")}`);
    setKv({ ...page, data: [...(kv?.data ?? []), ...page.data] });
  };
  return html`<section class="over memory" aria-label="Memory">
    <header class="over-head">
      <h2>Memory</h2>
      <span class="grow"></span>
      <${IconButton} icon="again" label="Read anew" onClick=${read} />
      <${IconButton} icon="close" label="Close" onClick=${() => (state.panel.value = "")} />
    </header>
    ${error && html`<p class="lost" role="alert">${error}</p>`}
    ${kv &&
    html`<div class="memory-body">
      <div class="figures">
        <p class="figure"><b>${count(kv.saved.tokens)}</b><span>tokens not read again so far</span></p>
        <p class="figure"><b>${kv.saved.seconds ? duration(kv.saved.seconds) : "—"}</b><span>${kv.saved.seconds || !kv.saved.tokens ? "saved so far" : "saved: too little was read to know the speed"}</span></p>
        ${kv.models.map((one) => html`<${Room} key=${one.model} one=${one} />`)}
      </div>
      <${Table} kept=${kv.data} />
      ${kv.has_more && html`<button type="button" class="earlier" onClick=${() => attempt(more)}>Older conversations</button>`}
      <${Nexts} nexts=${kv.evicted_next} />
    </div>`}
  </section>`;
}

/** @param {{one: ModelKv}} props */
function Room({ one }) {
  const bytes = (one.tokens_in_memory * one.block_bytes) / one.block_tokens;
  return html`<p class="figure">
    <b>${size(bytes)}</b>
    <span>${count(one.tokens_in_memory)} tokens in memory of ${size(one.blocks * one.block_bytes)} for ${one.model}; ${counted(one.evicted_tokens, "token")} evicted</span>
  </p>`;
}

/** Names of checkpoints that are shown. */
const MOST_NAMES = 6;

/** @param {string[]} names */
const few = (names) => names.slice(0, MOST_NAMES).join(", ") + (names.length > MOST_NAMES ? ", …" : "");

/** Branches of a conversation that are shown: the fullest ones. */
const MOST_BRANCHES = 20;

/** @param {Kept} one @returns {[string, Held][]} */
const fullest = (one) =>
  Object.entries(one.branches)
    .sort(([, a], [, b]) => b.in_memory + b.on_disk - a.in_memory - a.on_disk)
    .slice(0, MOST_BRANCHES);

/** @param {Kept} one @param {number} number Of the branch that is its last one here. */
function others(one, number) {
  const more = Object.keys(one.branches).length - MOST_BRANCHES;
  return number === MOST_BRANCHES - 1 && more > 0 ? ` and ${count(more)} more` : "";
}

/** @param {{kept: Kept[]}} props */
function Table({ kept }) {
  return html`<div class="scrolls" tabindex="0" aria-label="By conversation and branch">
    <table>
      <thead>
        <tr><th>Conversation</th><th>Branch</th><th>Where its tokens are</th><th class="number">Memory</th><th class="number">Disk</th><th class="number">Pinned</th></tr>
      </thead>
      <tbody>
        ${kept.flatMap((one) => [
          ...fullest(one).map(
            ([name, held], number) => html`<tr key=${`${one.id} ${name}`}>
              <td>${number === 0 && html`<button type="button" class="link" onClick=${() => attempt(() => open(one.id))}>${nameOf(one.id)}</button>`}</td>
              <td>${name}${others(one, number)}</td>
              <td>
                <${Bar}
                  parts=${[
                    ["memory", held.in_memory, "in memory"],
                    ["disk", held.on_disk, "on disk"],
                    ["none", held.tokens - held.in_memory - held.on_disk, "not kept"],
                  ]}
                />
              </td>
              <td class="number">${count(held.in_memory)}</td>
              <td class="number">${count(held.on_disk)}</td>
              <td class="number">${held.pinned ? count(held.pinned) : ""}</td>
            </tr>`,
          ),
          one.checkpoints.length > 0 &&
            html`<tr key=${one.id}>
              <td></td>
              <td colspan="5">${counted(one.checkpoints.length, "checkpoint")}: ${few(one.checkpoints)}</td>
            </tr>`,
        ])}
      </tbody>
    </table>
  </div>`;
}

/** What goes first where memory runs short. @param {{nexts: Next[]}} props */
function Nexts({ nexts }) {
  if (nexts.length === 0) return html`<p class="hint">Nothing would be evicted next: there is no block that nobody uses.</p>`;
  return html`<section>
    <h3>What would be evicted next</h3>
    <ol class="nexts">
      ${nexts.map((one, number) => html`<li key=${number}>${counted(one.tokens, "token")} ${one.conversation ? html`of <bdi>“${nameOf(one.conversation)}”</bdi>` : "that no branch here has"}${one.branch ? `, ${one.branch}` : ""}</li>`)}
    </ol>
  </section>`;
}
