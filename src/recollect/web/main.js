/** The page: its frame, what happens when it is opened, and keys that hold everywhere. */

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { effect } from "@preact/signals";
import * as state from "./state.js";
import * as actions from "./actions.js";
import { open, readConversations, readModels } from "./loading.js";
import { needsKey } from "./api.js";
import { Compare } from "./compare.js";
import { Explore } from "./explore.js";
import { live } from "./live.js";
import { Memory } from "./memory.js";
import { PathView } from "./path_view.js";
import { KeyDialog, SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { TreeView } from "./tree_view.js";
import { Icon, IconButton, Prompt, html, counted } from "./widgets.js";

const NOTICE_MS = 8000;

/** @type {["explore" | "compare" | "memory", string][]} */
const VIEWS = [
  ["explore", "Explore"],
  ["compare", "Compare"],
  ["memory", "Memory"],
];

/** Whether the page has read what it shows first, or does so now. @type {"" | "now" | "done"} */
let started = "";

async function start() {
  if (needsKey.value || started === "now") return;
  started = "now";
  await actions.attempt(async () => {
    try {
      await readConversations();
      await readModels();
    } finally {
      live();
    }
    const named = location.hash.slice(1);
    const first = named || state.conversations.value[0]?.id;
    if (first) await open(first);
    started = "done";
  });
  if (started === "now") started = "";
}

function Head() {
  const [asks, setAsks] = useState(/** @type {"" | "name" | "delete"} */ (""));
  const id = state.current.value;
  const one = state.opened.value;
  const tree = state.tree.value;
  const isDark = state.isDark.value;
  /** @param {"explore" | "compare" | "memory" | "settings"} name */
  const opens = (name) => () => (state.panel.value = state.panel.value === name ? "" : name);
  const done = () => setAsks("");
  return html`<header class="head">
    <div class="head-title">
      <button type="button" class="title" disabled=${!one} title="Rename" onClick=${() => setAsks("name")}>
        ${one ? state.titleOf(one) : "recollect"}
      </button>
      ${id &&
      html`<span class="hint">
        ${counted(tree.nodes.size, "message")}${state.isOpening.value ? " so far" : `, ${counted(Object.keys(tree.tips).length, "branch").replace("branchs", "branches")}`}
      </span>`}
    </div>
    <nav class="head-tools" aria-label="Views">
      ${VIEWS.map(
        ([name, label]) => html`<button type="button" key=${name} class="view-button" aria-pressed=${state.panel.value === name} disabled=${!id && name !== "memory"} onClick=${opens(name)} title=${label}>
          <${Icon} name=${name} /><span>${label}</span>
        </button>`,
      )}
      <${IconButton} icon="down" label="Export" disabled=${!id} onClick=${() => actions.once("export", actions.exportFile)} />
      <label class="icon-button" title="Import a file"
        ><${Icon} name="up" /><input
          class="away"
          type="file"
          accept=".json,application/json"
          aria-label="Import a file"
          onChange=${(/** @type {any} */ event) => {
            for (const file of event.target.files) void actions.attempt(() => actions.importFile(file));
            event.target.value = "";
          }}
      /></label>
      <${IconButton} icon="trash" label="Delete the conversation" disabled=${!id} onClick=${() => setAsks("delete")} />
      <${IconButton} icon="gear" label="Settings" onClick=${opens("settings")} />
      <${IconButton} icon=${isDark ? "sun" : "moon"} label="Light or dark" onClick=${() => state.useTheme(isDark ? "light" : "dark")} />
    </nav>
    ${asks === "name" &&
    html`<${Prompt} title="Name the conversation" label="Its name" value=${one ? state.titleOf(one) : ""} action="Name" onClose=${done} onDone=${(/** @type {string} */ title) => {
      done();
      void actions.attempt(() => actions.rename(title));
    }} />`}
    ${asks === "delete" &&
    id &&
    html`<${Sure} text=${`${counted(tree.nodes.size, "message")} in all branches are deleted.`} onClose=${done} onDone=${() => {
      done();
      void actions.attempt(() => actions.deleteConversation(id));
    }} />`}
  </header>`;
}

/** @param {{text: string, onClose: () => void, onDone: () => void}} props */
function Sure({ text, onClose, onDone }) {
  return html`<dialog ref=${(/** @type {HTMLDialogElement | null} */ one) => one && !one.open && one.showModal()} class="dialog" aria-label="Delete the conversation" onClose=${onClose}>
    <h2>Delete the conversation?</h2>
    <p>${text}</p>
    <div class="row end">
      <button type="button" onClick=${onClose}>Keep it</button>
      <button type="button" class="primary danger" onClick=${onDone}>Delete</button>
    </div>
  </dialog>`;
}

/** What a phone shows. */
function Tabs() {
  /** @type {["list" | "tree" | "path", string][]} */
  const tabs = [
    ["list", "Chats"],
    ["tree", "Tree"],
    ["path", "Chat"],
  ];
  return html`<nav class="tabs" aria-label="Parts">
    ${tabs.map(
      ([name, label]) => html`<button type="button" key=${name} aria-pressed=${state.shown.value === name} onClick=${() => (state.shown.value = name)}>${label}</button>`,
    )}
  </nav>`;
}

function Notice() {
  const notice = state.notice.value;
  useEffect(() => {
    if (notice?.kind !== "info") return undefined; // what has failed stays until it is read
    const timer = setTimeout(() => (state.notice.value = null), NOTICE_MS);
    return () => clearTimeout(timer);
  }, [notice]);
  return html`<div class="notices" role="status" aria-live="polite">
    ${notice &&
    html`<p class=${`notice ${notice.kind}`}>
      <span class="notice-text">${notice.text}</span><${IconButton} icon="close" label="Dismiss" onClick=${() => (state.notice.value = null)} />
    </p>`}
  </div>`;
}

function App() {
  if (needsKey.value) return html`<${KeyDialog} onKey=${start} />`;
  const panel = state.panel.value;
  return html`<div class="app" data-shown=${state.shown.value}>
      <${Sidebar} />
      <main class="main">
        <${Head} />
        <div class="panes">
          <${TreeView} />
          <${PathView} />
          ${panel === "explore" && html`<${Explore} />`}
          ${panel === "compare" && html`<${Compare} />`}
          ${panel === "memory" && html`<${Memory} />`}
        </div>
      </main>
      <${Tabs} />
      ${panel === "settings" && html`<${SettingsDialog} />`}
    </div>
    <${Notice} />`;
}

// Colours are set on the document, so that what lies outside of the page's parts has them, too.
effect(() => {
  document.documentElement.dataset.theme = state.isDark.value ? "dark" : "light";
});

// A server that was not there yet when the page was.
effect(() => {
  if (state.isLive.value && started === "") void start();
});

effect(() => {
  const one = state.opened.value;
  document.title = one ? `${state.titleOf(one)} · recollect` : "recollect";
});

/** @param {DragEvent} event @returns {boolean} Whether files are dragged; a text goes into the field it is dropped on. */
const hasFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;
addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (hasFiles(event)) event.preventDefault();
  for (const file of event.dataTransfer?.files ?? []) void actions.attempt(() => actions.importFile(file));
});
addEventListener("keydown", (event) => {
  const isTaken = event.defaultPrevented || /** @type {Element} */ (event.target).closest("dialog, input, textarea, select");
  if (event.key === "Escape" && !isTaken) state.panel.value = "";
});
addEventListener("hashchange", () => {
  const id = location.hash.slice(1);
  if (id && id !== state.current.value) void actions.attempt(() => open(id));
});

render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
void start();
