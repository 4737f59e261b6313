/** Two branches beside each other: what they share, and the words in which they part. */

import { useEffect, useMemo, useState } from "preact/hooks";
import * as state from "./state.js";
import { select } from "./loading.js";
import { differences, sideOf } from "./differences.js";
import { pathTo } from "./tree.js";
import { firstWords, speaker } from "./tree_view.js";
import { IconButton, count, counted, html } from "./widgets.js";

/** @typedef {import("./types").TreeNode} TreeNode */

/** Ends that one can choose from; a browser takes seconds for a list of thousands. */
const MOST_ENDS = 200;
/** Rows that are drawn at first, and how many more each time one asks for them. */
const MOST_ROWS = 60;
const MORE_ROWS = 200;

/**
 * What may be compared: what is, the ends of branches, and all other ends.
 *
 * @returns {{id: string, label: string}[]}
 */
function ends() {
  const tree = state.tree.value;
  const named = Object.entries(tree.tips).filter(([, id]) => id !== null);
  const known = new Set(named.map(([, id]) => id));
  const others = [...tree.nodes.values()].filter((node) => node.children.length === 0 && !known.has(node.id));
  const found = [
    ...named.map(([name, id]) => ({ id: /** @type {string} */ (id), label: name })),
    ...others.map((node) => ({ id: node.id, label: firstWords(node).slice(0, 50) })),
  ];
  const few = found.slice(0, MOST_ENDS);
  for (const id of state.compared.value) {
    const node = tree.nodes.get(id ?? "");
    if (node && !few.some((one) => one.id === id)) {
      few.unshift(found.find((one) => one.id === id) ?? { id: node.id, label: firstWords(node).slice(0, 50) });
    }
  }
  return few;
}

/** @param {{side: number, options: {id: string, label: string}[]}} props */
function Choice({ side, options }) {
  const id = state.compared.value[side];
  return html`<select
    aria-label=${side === 0 ? "The first branch" : "The second branch"}
    value=${id ?? ""}
    onChange=${(/** @type {any} */ event) => {
      const next = [...state.compared.value];
      next[side] = event.target.value || null;
      state.compared.value = next;
    }}
  >
    ${options.map((one) => html`<option key=${one.id} value=${one.id}>${one.label}</option>`)}
  </select>`;
}

/** @typedef {import("./differences.js").Run} Run */

/** @param {{node: TreeNode | undefined, runs: Run[]}} props */
function Side({ node, runs }) {
  if (!node) return html`<div class="side none"></div>`;
  return html`<div class="side">
    <p class="who">${speaker(node)}</p>
    <p class="side-text">
      ${runs.map((run, number) =>
        run.kind === "same" ? run.text : html`<mark key=${number} class=${run.kind}>${run.text}</mark>`,
      )}
    </p>
  </div>`;
}

/** Two messages that stand at the same place. @param {{left: TreeNode | undefined, right: TreeNode | undefined}} props */
function Row({ left, right }) {
  const runs = useMemo(() => {
    if (left && right && left.role === right.role) return differences(left.text, right.text);
    return /** @type {Run[]} */ ([
      { kind: "less", text: left?.text ?? "" },
      { kind: "more", text: right?.text ?? "" },
    ]);
  }, [left?.text, right?.text, left?.role, right?.role]);
  return html`<div class="sides">
    <${Side} node=${left} runs=${sideOf(runs, "less")} />
    <${Side} node=${right} runs=${sideOf(runs, "more")} />
  </div>`;
}

export function Compare() {
  const options = useMemo(ends, [state.tree.value, state.compared.value]);
  const [most, setMost] = useState(MOST_ROWS);
  const [one, two] = state.compared.value;
  useEffect(() => setMost(MOST_ROWS), [one, two]);
  if (one === null || two === null) {
    const at = one ?? state.selected.value ?? options[0]?.id ?? null;
    const other = two ?? options.find((known) => known.id !== at)?.id ?? null;
    if (at !== one || other !== two) queueMicrotask(() => (state.compared.value = [at, other]));
  }
  const [a, b] = [pathTo(state.tree.value, one), pathTo(state.tree.value, two)];
  let shared = 0;
  while (shared < a.length && shared < b.length && a[shared].id === b[shared].id) shared += 1;
  const rows = Math.max(a.length, b.length) - shared;
  return html`<section class="over compare" aria-label="Compare">
    <header class="over-head">
      <h2>Compare</h2>
      <span class="grow"></span>
      <${IconButton} icon="close" label="Close" onClick=${() => (state.panel.value = "")} />
    </header>
    <div class="sides heads">
      <${Choice} side=${0} options=${options} />
      <${Choice} side=${1} options=${options} />
    </div>
    <div class="sides-scroll" tabindex="0" aria-label="Both branches">
      ${shared > 0 && html`<p class="shared">${counted(shared, "message")} in common</p>`}
      ${[...Array(Math.max(0, Math.min(most, rows)))].map((_, row) => {
        const [left, right] = [a[shared + row], b[shared + row]];
        return html`<${Row} key=${`${left?.id} ${right?.id}`} left=${left} right=${right} />`;
      })}
      ${rows > most &&
      html`<button type="button" class="earlier" onClick=${() => setMost(most + MORE_ROWS)}>
        Show ${Math.min(MORE_ROWS, rows - most)} more of ${count(rows - most)}
      </button>`}
      ${rows === 0 && html`<p class="shared">Nothing differs.</p>`}
    </div>
    <footer class="sides heads">
      ${[one, two].map(
        (id, side) => html`<button type="button" key=${side} disabled=${id === null} onClick=${() => {
          select(id);
          state.panel.value = "";
        }}>Go on with this one</button>`,
      )}
    </footer>
  </section>`;
}
