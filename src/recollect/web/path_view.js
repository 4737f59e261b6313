/** The branch to the chosen message as a chat, and the field in which one asks. */

import { useEffect, useRef, useState } from "preact/hooks";
import * as state from "./state.js";
import * as actions from "./actions.js";
import { select } from "./loading.js";
import { Growing, Message } from "./message.js";
import { branchesAt, checkpointsAt, newestBelow } from "./tree.js";
import { firstWords } from "./tree_view.js";
import { GoingLine, Icon, IconButton, NAME_HINT, NAME_PATTERN, Prompt, count, html } from "./widgets.js";

/** Messages of a path that are drawn at first, and how many more each time one asks for them. */
const MOST_SHOWN = 60;
const MORE_SHOWN = 200;

/** What was said after the chosen message, in other branches. */
function Continuations() {
  const tree = state.tree.value;
  const node = tree.nodes.get(state.selected.value ?? "");
  const next = node ? node.children : [];
  if (next.length === 0 || state.growing.value.length > 0) return null;
  return html`<nav class="continuations" aria-label="What follows here">
    <p>${next.length === 1 ? "It goes on:" : `It goes on in ${next.length} ways:`}</p>
    ${next.slice(0, 12).map((id) => {
      const child = /** @type {import("./types").TreeNode} */ (tree.nodes.get(id));
      return html`<button type="button" key=${id} onClick=${() => select(newestBelow(tree, id))}>
        <${Icon} name="go" /> ${firstWords(child).slice(0, 70) || "…"}
      </button>`;
    })}
  </nav>`;
}

/** Names of a place that are shown. */
const MOST_NAMES = 12;

/** Names of where one stands, and what can be done with the place. */
function Where() {
  const [asks, setAsks] = useState(/** @type {"" | "fork" | "checkpoint" | "branch"} */ (""));
  const tree = state.tree.value;
  const id = state.selected.value;
  if (id === null) return null;
  const branches = branchesAt(tree, id);
  const places = checkpointsAt(tree, id);
  let point = 1;
  while (Object.hasOwn(tree.checkpoints, `point-${point}`)) point += 1;
  const one = branches.find((name) => name === state.goingBranch.value) ?? branches[0];
  /** @param {() => Promise<unknown>} action */
  const done = (action) => {
    setAsks("");
    void actions.attempt(action);
  };
  return html`<div class="where">
    ${[...new Set([...(one ? [one] : []), ...branches])].slice(0, MOST_NAMES).map(
      (name) => html`<button
        type="button"
        key=${name}
        class=${name === one ? "tag branch chosen" : "tag branch"}
        title="The branch that stands here; click to rename it"
        onClick=${() => {
          state.branch.value = name;
          if (name !== "main") setAsks("branch");
        }}
      >
        ${name}
      </button>`,
    )}
    ${places.slice(0, MOST_NAMES).map(
      (name) => html`<span key=${name} class="tag checkpoint">
        <${Icon} name="flag" /><span>${name}</span>
        <button type="button" aria-label=${`Forget checkpoint ${name}`} onClick=${() => done(() => actions.deleteCheckpoint(name))}>×</button>
      </span>`,
    )}
    ${branches.length > MOST_NAMES && html`<span class="hint">and ${count(branches.length - MOST_NAMES)} more</span>`}
    <span class="grow"></span>
    <${IconButton} icon="fork" label="Begin a branch here" text="Branch" onClick=${() => setAsks("fork")} />
    <${IconButton} icon="flag" label="Make a checkpoint here" text="Checkpoint" onClick=${() => setAsks("checkpoint")} />
    ${branches.length === 0 &&
    html`<${IconButton} icon="rewind" label=${`Rewind ${state.branch.value} to here`} text="Rewind" onClick=${() => actions.once("rewind", actions.rewind)} />`}
    ${asks === "fork" &&
    html`<${Prompt} title="A branch from here" label="Its name" value=${actions.nameFor("idea")} action="Fork" pattern=${NAME_PATTERN} hint=${NAME_HINT} onClose=${() => setAsks("")} onDone=${(/** @type {string} */ name) => done(() => actions.fork(name))} />`}
    ${asks === "checkpoint" &&
    html`<${Prompt} title="A checkpoint here" label="Its name" value=${`point-${point}`} action="Keep" pattern=${NAME_PATTERN} hint=${NAME_HINT} onClose=${() => setAsks("")} onDone=${(/** @type {string} */ name) => done(() => actions.checkpoint(name))} />`}
    ${asks === "branch" &&
    html`<${Prompt} title="Rename the branch" label="Its name" value=${one} action="Rename" pattern=${NAME_PATTERN} hint=${NAME_HINT} onClose=${() => setAsks("")} onDone=${(/** @type {string} */ name) => done(() => actions.renameBranch(one, name))} />`}
  </div>`;
}

function Composer() {
  const field = useRef(/** @type {HTMLTextAreaElement | null} */ (null));
  const text = state.draft.value;
  const node = state.tree.value.nodes.get(state.selected.value ?? "");
  const isBusy = state.growing.value.some((one) => one.isOwn);
  const isNew = node !== undefined && state.goingBranch.value === null;
  useEffect(() => {
    const element = field.current;
    if (!element) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight, 220)}px`;
  }, [text]);
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    const said = text.trim();
    if (!said || isBusy) return;
    void actions.attempt(() => actions.ask(said));
  };
  return html`<form class="composer" onSubmit=${submit}>
    <${Where} />
    <div class="composer-field">
      <textarea
        id="question"
        ref=${field}
        rows="1"
        aria-label="Question"
        placeholder=${isNew ? "Ask here: a new branch begins" : "Ask something"}
        value=${text}
        onInput=${(/** @type {any} */ event) => (state.draft.value = event.target.value)}
        onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
        }}
      ></textarea>
      <button class="send" aria-label="Ask" title="Ask" disabled=${!text.trim() || isBusy}><${Icon} name="send" /></button>
    </div>
    <${GoingLine} going=${node?.goingOn ?? null} label=${isNew ? "A new branch here:" : "Going on here:"} />
  </form>`;
}

export function PathView() {
  const scroller = useRef(/** @type {HTMLElement | null} */ (null));
  const [most, setMost] = useState(MOST_SHOWN);
  const path = state.path.value;
  const growing = state.growing.value;
  const id = state.selected.value;
  useEffect(() => setMost(MOST_SHOWN), [state.current.value]);
  // One sees the end of the path, and what is generated, unless one has scrolled away from it.
  useEffect(() => {
    const element = scroller.current;
    // After the messages have become elements, which they do once they are there.
    requestAnimationFrame(() => element && (element.scrollTop = element.scrollHeight));
  }, [id, growing.length]);
  useEffect(() => {
    const element = scroller.current;
    if (!element || growing.length === 0) return;
    if (element.scrollHeight - element.scrollTop - element.clientHeight < 140) element.scrollTop = element.scrollHeight;
  });
  const shown = path.slice(-most);
  const earlier = path.length - shown.length;
  return html`<section class="path" aria-label="Conversation">
    <div class="messages" ref=${scroller} tabindex="0" aria-label="Messages">
      ${path.length === 0 && growing.length === 0 && !state.isOpening.value && html`<${Welcome} />`}
      ${earlier > 0 &&
      html`<button type="button" class="earlier" onClick=${() => setMost(most + MORE_SHOWN)}>
        Show ${Math.min(MORE_SHOWN, earlier)} earlier messages${earlier > MORE_SHOWN && ` of ${count(earlier)}`}
      </button>`}
      ${shown.map((node) => html`<${Message} key=${node.id} node=${node} isLast=${node.id === id} />`)}
      ${growing.map((reply) => html`<${Growing} key=${reply.id} reply=${reply} />`)}
      <${Continuations} />
    </div>
    <${Composer} />
  </section>`;
}

function Welcome() {
  const examples = [
    "Plan a weekend in a city by a river.",
    "Explain a hash table to a ten-year-old.",
    "Write a Python function that merges two sorted lists.",
  ];
  return html`<div class="welcome">
    <h2>Nothing is read twice here</h2>
    <p>
      Ask, then go back to any message and ask something else. Every way stays in the tree, and what they share is
      computed once.
    </p>
    ${examples.map(
      (text) => html`<button type="button" key=${text} onClick=${() => {
        state.draft.value = text;
        document.getElementById("question")?.focus();
      }}>${text}</button>`,
    )}
  </div>`;
}
