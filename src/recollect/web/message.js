/** One message of the path: what it says, what it cost, and what can be done with it. */

import { useState } from "preact/hooks";
import * as state from "./state.js";
import * as actions from "./actions.js";
import { select } from "./loading.js";
import { Markdown } from "./markdown.js";
import { memo } from "./memo.js";
import { newestBelow, siblings } from "./tree.js";
import { speaker } from "./tree_view.js";
import { Icon, IconButton, ReuseBar, copyText, html, count } from "./widgets.js";

/**
 * @typedef {import("./types").TreeNode} TreeNode
 * @typedef {import("./types").Pending} Pending
 * @typedef {import("./types").Call} Call
 */

const CUT = /** @type {Record<string, string>} */ ({ length: "cut at the token limit", cancelled: "stopped" });

/** @param {{text: string, isOpen?: boolean}} props */
function Reasoning({ text, isOpen = false }) {
  if (!text) return null;
  return html`<details class="fold-away" open=${isOpen}>
    <summary>Reasoning</summary>
    <${Markdown} text=${text} />
  </details>`;
}

/** @param {string} text */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** @param {{calls: Call[]}} props */
function Calls({ calls }) {
  return calls.map(
    (one) => html`<details key=${one.id} class="fold-away" open>
      <summary>Calls <code>${one.name}</code></summary>
      <pre tabindex="0">${pretty(one.arguments)}</pre>
    </details>`,
  );
}

/** Which of several messages at the same place this is. @param {{node: TreeNode}} props */
function Pager({ node }) {
  const all = siblings(state.tree.value, node);
  if (all.length < 2) return null;
  const number = all.indexOf(node.id);
  /** @param {number} to */
  const go = (to) => select(newestBelow(state.tree.value, all[to]));
  return html`<span class="pager">
    <${IconButton} icon="left" label="The one before" disabled=${number === 0} onClick=${() => go(number - 1)} />
    <span>${number + 1} of ${all.length}</span>
    <${IconButton} icon="right" label="The next one" disabled=${number + 1 === all.length} onClick=${() => go(number + 1)} />
  </span>`;
}

/** @param {{node: TreeNode}} props */
function Editor({ node }) {
  const [text, setText] = useState(node.text);
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (text.trim()) void actions.once(`edit ${node.id}`, () => actions.edit(node, text.trim()));
  };
  return html`<form class="editor" onSubmit=${submit}>
    <textarea
      aria-label="The question, edited"
      value=${text}
      rows=${Math.min(10, text.split("\n").length + 1)}
      onInput=${(/** @type {any} */ event) => setText(event.target.value)}
      onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
        if (event.key === "Escape") state.editing.value = null;
      }}
      autofocus
    ></textarea>
    <div class="row end">
      <button type="button" onClick=${() => (state.editing.value = null)}>Cancel</button>
      <button class="primary">Ask on a new branch</button>
    </div>
  </form>`;
}

/** @param {{node: TreeNode, isLast: boolean}} props */
function Tools({ node, isLast }) {
  const isReply = node.role === "assistant";
  return html`<div class="message-tools">
    <${IconButton} icon="copy" label="Copy" onClick=${() => copyText(node.text).catch(state.tell)} />
    ${node.role === "user" &&
    html`<${IconButton} icon="edit" label="Edit the question" onClick=${() => (state.editing.value = node.id)} />`}
    ${isReply &&
    html`<${IconButton} icon="again" label="Another reply" onClick=${() => actions.once(`again ${node.id}`, () => actions.regenerate(node))} />`}
    ${!isLast && html`<${IconButton} icon="fork" label="Go on from here" onClick=${() => select(node.id)} />`}
    <${IconButton} icon="trash" label="Take out of this branch" onClick=${() => actions.once(`take out ${node.id}`, () => actions.deleteItem(node))} />
    <${Pager} node=${node} />
  </div>`;
}

/** @param {{node: TreeNode, isLast: boolean}} props */
function WholeMessage({ node, isLast }) {
  const isEdited = state.editing.value === node.id;
  const cut = CUT[node.finishReason ?? ""];
  return html`<article class=${`message ${node.role}`} aria-label=${speaker(node)}>
    <header class="message-head">
      <span class="who">${speaker(node)}</span>
      <${Tools} node=${node} isLast=${isLast} />
    </header>
    <${Reasoning} text=${node.reasoning} />
    ${isEdited
      ? html`<${Editor} node=${node} />`
      : node.role === "tool"
        ? html`<details class="fold-away" open=${node.text.length < 400}>
            <summary>Result</summary>
            <pre tabindex="0">${node.text}</pre>
          </details>`
        : html`<${Markdown} text=${node.text} />`}
    <${Calls} calls=${node.calls} />
    ${cut &&
    html`<p class="cut">
      ${cut}
      ${isLast &&
      !state.isGrowing.value &&
      html`<button type="button" onClick=${() => actions.once(`continue ${node.id}`, () => actions.carryOn(node))}>
        <${Icon} name="go" /> Continue
      </button>`}
    </p>`}
    ${node.usage && html`<${ReuseBar} usage=${node.usage} speed=${state.readingSpeed.value} />`}
  </article>`;
}

/** Not drawn again for what happens to other messages, such as a reply that grows. */
export const Message = memo(WholeMessage);

/** A reply while it is generated. @param {{reply: Pending}} props */
export function Growing({ reply }) {
  const isReading = !reply.text && !reply.reasoning;
  return html`<div class="growing" aria-live="polite" aria-busy="true">
    ${reply.question !== null &&
    html`<article class="message user" aria-label="You">
      <header class="message-head"><span class="who">You</span></header>
      <${Markdown} text=${reply.question} />
    </article>`}
    <article class="message assistant" aria-label="Reply">
      <header class="message-head">
        <span class="who">Reply</span>
        ${reply.stop &&
        html`<button type="button" class="stop" onClick=${reply.stop}><${Icon} name="stop" /> Stop</button>`}
      </header>
      ${isReading && html`<${Reading} reply=${reply} />`}
      <${Reasoning} text=${reply.reasoning} isOpen=${!reply.text} />
      ${reply.text && html`<${Markdown} text=${reply.text} />`}
    </article>
  </div>`;
}

/** How much of the prompt has been read. @param {{reply: {computed: number, tokens: number}}} props */
export function Reading({ reply }) {
  if (!reply.tokens) return html`<p class="reading"><span class="pulse"></span>Reading</p>`;
  return html`<p class="reading">
    <progress max=${reply.tokens} value=${reply.computed} aria-label="Tokens read"></progress>
    ${count(reply.computed)} of ${count(reply.tokens)} tokens read
  </p>`;
}
