/** Small parts that several views share: icons, numbers in words, the bar of reuse, dialogs. */

import { h } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import htm from "htm";

/**
 * @typedef {import("./types").Usage} Usage
 * @typedef {import("./types").GoingOn} GoingOn
 */

export const html = htm.bind(h);

/** Outlines on a grid of 16. */
const ICONS = {
  plus: "M8 3v10M3 8h10",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM11 11l3.5 3.5",
  edit: "M3 13l.7-2.8L11 3l2 2-7.2 7.3L3 13Z",
  again: "M13 8a5 5 0 1 1-1.5-3.5M13 2v3h-3",
  fork: "M4 2v12M4 8c0 4 8 1 8 5",
  flag: "M4 14V2.5h8L10 6l2 3.5H4",
  trash: "M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.7 9h5.6l.7-9",
  copy: "M6 6h7v7.5H6zM3 10V2.5h7",
  stop: "M4.5 4.5h7v7h-7z",
  send: "M8 13.5v-11M3.5 7 8 2.5 12.5 7",
  rewind: "M8 3 3 8l5 5M13 3 8 8l5 5",
  more: "M3 8h.01M8 8h.01M13 8h.01",
  go: "M3 8h10M9 4l4 4-4 4",
  left: "M10 3 5 8l5 5",
  right: "M6 3l5 5-5 5",
  close: "M4 4l8 8M12 4l-8 8",
  gear: "M2 5h6M12 5h2M2 11h2M8 11h6M10 3v4M6 9v4",
  memory: "M3 4h10v8H3zM6 2v2M10 2v2M6 12v2M10 12v2M6 7h4v2H6z",
  explore: "M8 14V9M8 9c0-4-5-2-5-6M8 9c0-4 5-2 5-6M8 9V2",
  compare: "M2 3h5v10H2zM9 3h5v10H9z",
  sun: "M8 11a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1",
  moon: "M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7Z",
  down: "M8 2v9M4 7.5 8 11.5l4-4M3 14h10",
  up: "M8 11V2.5M4 6l4-4 4 4M3 14h10",
  fit: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
};

/** @param {{name: keyof typeof ICONS}} props */
export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d=${ICONS[name]} /></svg>`;
}

/** @param {{icon: keyof typeof ICONS, label: string, text?: string, onClick: (event: any) => void, [more: string]: any}} props `text`: a word beside the icon. */
export function IconButton({ icon, label, text, onClick, ...more }) {
  return html`<button type="button" class=${text ? "icon-button worded" : "icon-button"} aria-label=${label} title=${label} onClick=${onClick} ...${more}>
    <${Icon} name=${icon} />${text}
  </button>`;
}

/**
 * Put a text on the clipboard; a page that came over plain HTTP from another machine has the old way alone.
 *
 * @param {string} text
 */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "away";
  const before = document.activeElement;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  if (before instanceof HTMLElement) before.focus();
  if (!isDone) throw new Error("This browser lets the page copy nothing: select the text, and copy it by keys.");
}

/** @param {number} value */
export const count = (value) => value.toLocaleString("en");

/**
 * @param {number} value
 * @param {string} one
 */
export const counted = (value, one) => `${count(value)} ${one}${value === 1 ? "" : "s"}`;

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 0.01) return "<10 ms";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return `${Math.round(seconds / 60)} min`;
}

/** @param {number} bytes */
export function size(bytes) {
  if (bytes < 2 ** 20) return `${count(Math.round(bytes / 2 ** 10))} KiB`;
  return bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

/** @param {GoingOn} going */
export function goingText(going) {
  const about = going.seconds !== null && going.seconds >= 0.01 ? "about " : "";
  const time = going.seconds === null ? "" : `, ${about}${duration(going.seconds)}`;
  return `${counted(going.to_compute, "token")} to compute${time}`;
}

/** @param {{going: GoingOn | null, label: string}} props */
export function GoingLine({ going, label }) {
  if (!going) return null;
  return html`<div class="going">
    <span>${label}</span>
    <${Bar}
      parts=${[
        ["memory", going.in_memory, "in memory"],
        ["disk", going.on_disk, "on disk"],
        ["computed", going.to_compute, "to compute"],
      ]}
    />
    <span>${goingText(going)}</span>
  </div>`;
}

/** @param {{parts: [string, number, string][]}} props Of each part its kind, its tokens and its name. */
export function Bar({ parts }) {
  const all = parts.reduce((sum, [, tokens]) => sum + tokens, 0);
  const told = parts.filter(([, tokens]) => tokens > 0);
  const label = told.map(([, tokens, name]) => `${count(tokens)} ${name}`).join(", ");
  return html`<span class="bar" role="img" aria-label=${`Tokens: ${label}`} title=${label}>
    ${told.map(
      ([kind, tokens]) =>
        html`<span key=${kind} class=${`part ${kind}`} style=${{ width: `${(100 * tokens) / all}%` }}></span>`,
    )}
  </span>`;
}

/**
 * What of a prompt was reused, and from where; and what was read again, and why.
 *
 * @param {{usage: Usage, speed: number | null}} props The speed of reading, in tokens a second.
 */
export function ReuseBar({ usage, speed }) {
  const ahead = usage.read_ahead_tokens ?? 0;
  const memory = usage.reused_tokens - usage.restored_tokens;
  /** @type {[string, number, string][]} */
  const parts = [
    ["memory", memory, "from memory"],
    ["disk", usage.restored_tokens, "from disk"],
    ["ahead", ahead, "read ahead"],
    ["computed", usage.computed_tokens - ahead, "computed"],
  ];
  const words = parts.filter(([, tokens]) => tokens > 0);
  const saved = speed ? usage.reused_tokens / speed : null;
  const isLost = usage.lost_tokens > 0 && usage.reason !== "new";
  return html`<div class="reuse">
    <${Bar} parts=${parts} />
    <p class="reuse-words">
      ${words.map(
        ([kind, tokens, name]) =>
          html`<span key=${kind}><i class=${`dot ${kind}`}></i>${count(tokens)} ${name}</span>`,
      )}
      <span>first token after ${duration(usage.ttft_s)}</span>
      ${saved !== null && saved > 0.05 && html`<span>${duration(saved)} saved</span>`}
    </p>
    ${isLost &&
    html`<p class="lost">
      ${counted(usage.lost_tokens, "token")} read again: ${usage.difference ?? usage.reason.replace(/_/g, " ")}
    </p>`}
  </div>`;
}

/**
 * A window before the page, which Escape closes.
 *
 * @param {{title: string, onClose: () => void, children?: any}} props
 */
export function Dialog({ title, onClose, children }) {
  const ref = useRef(/** @type {HTMLDialogElement | null} */ (null));
  useEffect(() => {
    ref.current?.showModal();
  }, []);
  return html`<dialog ref=${ref} class="dialog" aria-label=${title} onClose=${onClose} onCancel=${onClose}>
    <header class="dialog-head">
      <h2>${title}</h2>
      <${IconButton} icon="close" label="Close" onClick=${onClose} />
    </header>
    ${children}
  </dialog>`;
}

/**
 * Ask for one line, such as a name.
 *
 * @param {{title: string, label: string, value: string, action: string, pattern?: string, hint?: string, onDone: (value: string) => void, onClose: () => void}} props
 */
export function Prompt({ title, label, value, action, pattern, hint, onDone, onClose }) {
  const [text, setText] = useState(value);
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <form
      class="prompt"
      onSubmit=${(/** @type {Event} */ event) => {
        event.preventDefault();
        if (text.trim()) onDone(text.trim());
      }}
    >
      <label
        >${label}
        <input
          value=${text}
          pattern=${pattern}
          title=${hint}
          autofocus
          required
          onInput=${(/** @type {any} */ event) => setText(event.target.value)}
        />
      </label>
      ${hint && html`<p class="hint">${hint}</p>`}
      <div class="row end"><button class="primary">${action}</button></div>
    </form>
  <//>`;
}

/** What names of branches and checkpoints are made of, as the API has it. */
export const NAME_PATTERN = "[A-Za-z0-9_\\-]{1,64}";
export const NAME_HINT = "Letters, digits, _ and -; at most 64.";
