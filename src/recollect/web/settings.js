/** How replies are asked for: model, instructions, sampling, tools; and the page's own look and key. */

import { useState } from "preact/hooks";
import * as state from "./state.js";
import { key, needsKey, useKey } from "./api.js";
import { Dialog, html } from "./widgets.js";

/** @typedef {import("./types").Settings} Settings */

/** @type {[keyof Settings, string, string, string, string][]} Name, label, most, step, hint. */
const NUMBERS = [
  ["temperature", "Temperature", "2", "0.1", "model's own"],
  ["top_p", "Top p", "1", "0.05", "1"],
  ["max_output_tokens", "Most tokens", "100000", "1", "server's own"],
  ["seed", "Seed", "9007199254740991", "1", "drawn each time"],
];

/** @param {string} text @returns {string} What is wrong with it; empty: nothing. */
function wrongTools(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "Tools are a list: [{…}].";
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

export function SettingsDialog() {
  const values = state.settings.value;
  const [tools, setTools] = useState(values.tools);
  const wrong = wrongTools(tools);
  const close = () => (state.panel.value = "");
  /** @param {keyof Settings} name */
  const keep = (name) => (/** @type {any} */ event) => state.set({ [name]: event.target.value });
  return html`<${Dialog} title="Settings" onClose=${close}>
    <div class="settings">
      <label>
        Model
        <select value=${values.model} onChange=${keep("model")}>
          <option value="">The server's default</option>
          ${values.model &&
          !state.models.value.some((one) => one.id === values.model) &&
          html`<option value=${values.model}>${values.model} (not served here)</option>`}
          ${state.models.value.map((one) => html`<option key=${one.id} value=${one.id}>${one.id}</option>`)}
        </select>
      </label>
      <label>
        System prompt of new conversations
        <textarea rows="4" value=${values.system} onInput=${keep("system")}></textarea>
      </label>
      <div class="numbers">
        ${NUMBERS.map(
          ([name, label, most, step, hint]) => html`<label key=${name}>
            ${label}
            <input type="number" min="0" max=${most} step=${step} placeholder=${hint} value=${values[name]} onInput=${keep(name)} />
          </label>`,
        )}
      </div>
      <label>
        Tools, as the Responses API takes them
        <textarea
          rows="4"
          class="mono"
          placeholder='[{"type": "function", "name": "weather", "parameters": {"type": "object"}}]'
          value=${tools}
          aria-invalid=${wrong !== ""}
          onInput=${(/** @type {any} */ event) => {
            setTools(event.target.value);
            if (!wrongTools(event.target.value)) state.set({ tools: event.target.value });
          }}
        ></textarea>
      </label>
      ${wrong && html`<p class="lost" role="alert">Not used yet: ${wrong}</p>`}
      <fieldset class="choice">
        <legend>Colours</legend>
        ${[
          ["", "As the system"],
          ["light", "Light"],
          ["dark", "Dark"],
        ].map(
          ([value, label]) => html`<label key=${value}>
            <input type="radio" name="theme" checked=${state.theme.value === value} onChange=${() => state.useTheme(value)} />
            ${label}
          </label>`,
        )}
      </fieldset>
      ${key.value && html`<button type="button" onClick=${() => useKey("")}>Forget the key of this tab</button>`}
    </div>
  <//>`;
}

/** @param {{onKey: () => void}} props */
export function KeyDialog({ onKey }) {
  const [text, setText] = useState("");
  return html`<main class="gate">
    <form
      class="gate-form"
      onSubmit=${(/** @type {Event} */ event) => {
        event.preventDefault();
        useKey(text);
        onKey();
      }}
    >
      <img src="/web/icon.svg" alt="" width="44" height="44" />
      <h1>This server asks for a key</h1>
      <p>It stays in this tab until the tab is closed. <code>recollect keys add NAME</code> makes one.</p>
      <label>
        Key
        <input type="password" autocomplete="off" required autofocus value=${text} onInput=${(/** @type {any} */ event) => setText(event.target.value)} />
      </label>
      ${key.value && needsKey.value && html`<p class="lost" role="alert">The server does not take that key.</p>`}
      <button class="primary">Go on</button>
    </form>
  </main>`;
}
