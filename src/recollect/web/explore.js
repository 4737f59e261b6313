/**
 * From one message several ways on, beside each other: the same question with other seeds and temperatures,
 * or several questions. What they share is computed once.
 */

import { batch, signal } from "@preact/signals";
import { useState } from "preact/hooks";
import * as state from "./state.js";
import * as actions from "./actions.js";
import { select } from "./loading.js";
import { Markdown } from "./markdown.js";
import { Reading } from "./message.js";
import { pathTo } from "./tree.js";
import { firstWords } from "./tree_view.js";
import { GoingLine, Icon, IconButton, ReuseBar, html } from "./widgets.js";

const MOST_WAYS = 8;
/** Temperatures from 0 to 2, with commas; the browser says where they are none. */
const HEATS = "[,;\\s]*(?:(?:[01]?\\.[0-9]+|[01]\\.?|2(?:\\.0*)?)(?:[,;\\s]+|$))*";

/**
 * @typedef {{name: string, prompt?: string, temperature?: number, seed?: number}} Way
 * @typedef {Way & {text: string, reasoning: string, computed: number, tokens: number, isDone: boolean, error: string}} Tried
 */

/**
 * What is tried in a conversation now, or was last.
 *
 * @typedef {object} Trial
 * @property {Tried[]} ways
 * @property {boolean} isAlike Whether all ways answer the same question.
 * @property {AbortController} control
 */

/** By conversation. @type {import("@preact/signals").Signal<Map<string, Trial>>} */
const trials = signal(new Map());

/** @param {Trial} trial */
const isUnderWay = (trial) => trial.ways.some((one) => !one.isDone);

/** @returns {Trial | undefined} That of the open conversation. */
const trialHere = () => trials.value.get(state.current.value ?? "");

/**
 * Begin all ways together, and show them while they are generated.
 *
 * @param {Way[]} ways
 * @param {boolean} isAlike
 */
async function begin(ways, isAlike) {
  const conversation = state.current.value;
  if (conversation === null) return;
  const control = new AbortController();
  const nothing = { text: "", reasoning: "", computed: 0, tokens: 0, isDone: false, error: "" };
  // Those of other conversations are kept only until they have ended.
  const others = [...trials.value].filter(([id, one]) => id !== conversation && isUnderWay(one));
  trials.value = new Map([
    ...others,
    [conversation, { ways: ways.map((one) => ({ ...one, ...nothing })), isAlike, control }],
  ]);
  /** @param {(one: Tried, index: number) => Tried} change */
  const change = (change) => {
    const trial = /** @type {Trial} */ (trials.value.get(conversation));
    trials.value = new Map(trials.value).set(conversation, { ...trial, ways: trial.ways.map(change) });
  };
  /** @param {number} index @param {(one: Tried) => Partial<Tried>} what */
  const put = (index, what) => change((one, number) => (number === index ? { ...one, ...what(one) } : one));
  /** @type {ReturnType<typeof state.gathered<number>>} */
  const grown = state.gathered((index, text, reasoning) =>
    put(index, (one) => ({ text: one.text + text, reasoning: one.reasoning + reasoning })),
  );
  /** @param {any} event */
  const onEvent = ({ type, index, computed, tokens, text = "", reasoning = "", error }) => {
    if (type === "explore.progress") put(index, () => ({ computed, tokens }));
    else if (type === "explore.delta") grown.add(index, text, reasoning);
    else if (type === "explore.branch_completed") put(index, () => ({ isDone: true }));
    else if (type === "explore.failed") {
      const isOne = typeof index === "number";
      change((one, number) =>
        one.isDone || (isOne && number !== index) ? one : { ...one, isDone: true, error: error.message },
      );
    }
  };
  for (const one of ways) state.trying.add(one.name);
  try {
    await actions.tryWays(ways, control.signal, onEvent);
  } finally {
    grown.flush();
    for (const one of ways) state.trying.delete(one.name);
    change((one) => (one.isDone ? one : { ...one, isDone: true, error: "Stopped." }));
  }
}

/** @param {string} name The way that one goes on with; what else was tried is folded away. */
function keep(name) {
  const tree = state.tree.value;
  const tried = trialHere()?.ways ?? [];
  const others = tried.filter((one) => one.name !== name).map((one) => pathTo(tree, tree.tips[one.name] ?? null));
  batch(() => {
    select(tree.tips[name] ?? null);
    state.branch.value = name;
    const kept = new Set(state.path.value);
    for (const way of others) {
      const first = way.find((node) => !kept.has(node));
      // One with which the conversation begins stays: above it there is nothing that one could unfold.
      const hidden = first?.parent === null ? state.folded : state.aside;
      if (first) hidden.value = new Set([...hidden.value, first.id]);
    }
    state.panel.value = "";
  });
  // The names of the others are given up; what they said stays in the tree.
  for (const one of tried) if (one.name !== name) void actions.attempt(() => actions.deleteBranch(one.name));
}

/** @param {{one: Tried, head: string, number: number, picked: Set<string>, pick: (name: string) => void}} props */
function Column({ one, head, number, picked, pick }) {
  const tip = state.tree.value.tips[one.name];
  const node = state.tree.value.nodes.get(tip ?? "");
  const how = [
    one.temperature === undefined ? "" : `temperature ${one.temperature}`,
    one.seed === undefined ? "" : `seed ${one.seed}`,
  ].filter(Boolean);
  return html`<article class="way" aria-label=${`Way ${number + 1}`}>
    <header>
      <b>${head}</b>
      <span class="hint">${how.join(", ")}</span>
    </header>
    <div class="way-text" tabindex="0" aria-label="What is said">
      ${one.error && html`<p class="lost">${one.error}</p>`}
      ${!one.text && !one.isDone && html`<${Reading} reply=${one} />`}
      ${one.reasoning && !one.text && html`<p class="hint">Thinking</p>`}
      <${Markdown} text=${one.text} />
    </div>
    ${node?.usage && html`<${ReuseBar} usage=${node.usage} speed=${state.readingSpeed.value} />`}
    ${one.isDone &&
    !one.error &&
    html`<footer class="row">
      <button type="button" class="primary" onClick=${() => keep(one.name)}>Keep this</button>
      <label class="row"><input type="checkbox" checked=${picked.has(one.name)} onChange=${() => pick(one.name)} /> Compare</label>
    </footer>`}
  </article>`;
}

export function Explore() {
  const [kind, setKind] = useState("replies");
  const [text, setText] = useState("");
  const [ways, setWays] = useState("4");
  const [heat, setHeat] = useState("0.8");
  const [picked, setPicked] = useState(/** @type {Set<string>} */ (new Set()));
  const node = state.tree.value.nodes.get(state.selected.value ?? "");
  const isAsked = node?.role === "user" || node?.role === "tool";
  const trial = trialHere();
  /** @param {string} name */
  const pick = (name) => {
    const next = new Set(picked);
    if (!next.delete(name)) next.add(name);
    setPicked(next);
  };

  /** @param {Event} event */
  function submit(event) {
    event.preventDefault();
    const lines = text.split("\n").filter((line) => line.trim());
    if (kind === "questions" && lines.length > MOST_WAYS) {
      state.tell(`At most ${MOST_WAYS} questions are tried at once, and these are ${lines.length}.`);
      return;
    }
    const number = Math.max(2, Math.min(MOST_WAYS, Number(ways) || 4));
    const heats = heat.split(/[,;\s]+/).filter(Boolean).map(Number);
    const begins = crypto.getRandomValues(new Uint16Array(1))[0];
    const names = actions.namesFor(kind === "replies" ? [...Array(number)].map(() => text || "way") : lines);
    /** @type {Way[]} */
    const found = names.map((name, index) => ({
      name,
      prompt: kind === "replies" ? text.trim() || undefined : lines[index],
      temperature: heats.length ? heats[index % heats.length] : undefined,
      seed: kind === "replies" ? begins + index : undefined,
    }));
    if (found.length === 0) return;
    setPicked(new Set());
    void actions.attempt(() => begin(found, kind === "replies"));
  }

  return html`<section class="over explore" aria-label="Explore">
    <header class="over-head">
      <h2>Explore</h2>
      <span class="hint">from ${node ? `“${firstWords(node).slice(0, 60)}”` : "the beginning"}</span>
      <span class="grow"></span>
      <${IconButton} icon="close" label="Close" onClick=${() => (state.panel.value = "")} />
    </header>
    <form class="explore-form" onSubmit=${submit}>
      <div class="choice" role="radiogroup" aria-label="What is tried">
        ${[
          ["replies", "Several replies to one question"],
          ["questions", "Several questions, one a line"],
        ].map(
          ([value, label]) => html`<label key=${value}><input type="radio" name="kind" checked=${kind === value} onChange=${() => setKind(value)} /> ${label}</label>`,
        )}
      </div>
      <textarea
        rows=${kind === "replies" ? 1 : 3}
        aria-label=${kind === "replies" ? "The question" : "The questions"}
        placeholder=${kind === "replies" ? (isAsked ? "The question that stands here" : "One question") : "One question a line"}
        required=${!(kind === "replies" && isAsked)}
        value=${text}
        onInput=${(/** @type {any} */ event) => setText(event.target.value)}
      ></textarea>
      <div class="row">
        ${kind === "replies" && html`<label class="short">Ways <input type="number" min="2" max=${MOST_WAYS} value=${ways} onInput=${(/** @type {any} */ event) => setWays(event.target.value)} /></label>`}
        <label class="short">Temperatures <input value=${heat} pattern=${HEATS} title="Numbers from 0 to 2, with commas" onInput=${(/** @type {any} */ event) => setHeat(event.target.value)} /></label>
        <span class="grow"></span>
        ${trial && isUnderWay(trial)
          ? html`<button type="button" onClick=${(/** @type {MouseEvent} */ event) => {
              if (event.detail < 2) trial.control.abort(); // not by the second of two clicks that began it
            }}><${Icon} name="stop" /> Stop</button>`
          : html`<button class="primary">Try them</button>`}
        <button
          type="button"
          disabled=${picked.size !== 2}
          onClick=${() => {
            const [one, two] = [...picked].map((name) => state.tree.value.tips[name] ?? null);
            state.compared.value = [one, two];
            state.panel.value = "compare";
          }}
        >
          Compare two
        </button>
      </div>
      <${GoingLine} going=${node?.goingOn ?? null} label="Each goes on here:" />
    </form>
    ${!trial && html`<p class="shared">Each way becomes a branch. What they share is computed once.</p>`}
    <div class="ways">
      ${trial?.ways.map(
        (one, number) =>
          html`<${Column} key=${one.name} one=${one} head=${trial.isAlike ? `Way ${number + 1}` : one.prompt} number=${number} picked=${picked} pick=${pick} />`,
      )}
    </div>
  </section>`;
}
