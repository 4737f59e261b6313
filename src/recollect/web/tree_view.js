/**
 * The tree, drawn: cards where they can be read, dots where they cannot, and never more than a few hundred
 * elements.
 *
 * d3-zoom owns where one looks (a transform); everything else is drawn from the state.
 */

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { select as selectElement } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { glide } from "./motion.js";
import * as state from "./state.js";
import { select } from "./loading.js";
import { CARD, DOTS_BELOW, branchesAt, checkpointsAt, extent, layout, lines, newestBelow, seen, siblings, withSprouts } from "./tree.js";
import { IconButton, goingText, duration, html, count } from "./widgets.js";

/**
 * @typedef {import("./types").Place} Place
 * @typedef {import("./types").TreeNode} TreeNode
 */

const MARGIN = 40;
/** @type {[number, number]} */
const SCALES = [0.01, 1.6];
const WARMTHS = { memory: "in memory", disk: "on disk", none: "not kept" };
/** What one waits for, in seconds, is a cost that one should see. */
const DEAR_S = 1;
/** Labels of branches and checkpoints on one card. */
const MOST_LABELS = 3;

/** @param {TreeNode} node */
export function speaker(node) {
  if (node.role === "user") return "You";
  if (node.role === "system") return "Instructions";
  if (node.role === "tool") return "Tool result";
  return node.calls.length ? `Calls ${node.calls.map((one) => one.name).join(", ")}` : "Reply";
}

/** @param {TreeNode} node */
export function firstWords(node) {
  const text = node.text || node.calls.map((one) => one.arguments).join(" ") || node.reasoning;
  const plain = text.slice(0, 200).replace(/^\s*(```|~~~).*$/gm, " "); // where code begins and ends
  return plain.replace(/[`*#>\s]+|\b_+\b|(?<!\w)_+|_+(?!\w)/g, " ").replace(/\s+/g, " ").trim();
}

/** @param {Place} place */
function labelsOf({ node }) {
  const branches = branchesAt(state.tree.value, node.id).map((name) => ({ name, kind: "branch" }));
  const places = checkpointsAt(state.tree.value, node.id).map((name) => ({ name, kind: "checkpoint" }));
  return [...places, ...branches];
}

/** @param {Place} place */
function elements(place) {
  const folds = place.node.children.length > 0 ? 1 : 0;
  return 4 + Math.min(labelsOf(place).length, MOST_LABELS + 1) + folds;
}

/** @param {string} id */
function toggle(id) {
  const all = new Set(state.folded.value);
  const away = (state.tree.value.nodes.get(id)?.children ?? []).filter((one) => state.aside.value.has(one));
  if (!all.delete(id) && away.length === 0) all.add(id);
  state.folded.value = all;
  if (away.length) state.aside.value = new Set([...state.aside.value].filter((one) => !away.includes(one)));
}

/** A message while it is said: nobody can go there yet. @param {{place: Place}} props */
function Sprout({ place: { node, x, y } }) {
  const reply = state.pending.value.get(node.id);
  const text = node.text || reply?.text || reply?.reasoning || "";
  return html`<div class=${`sprout ${node.role}`} aria-hidden="true" style=${{ transform: `translate(${x - CARD.width / 2}px, ${y}px)` }}>
    <span class="card-who">${speaker(node)}</span>
    ${reply && html`<span class="pulse"></span>`}
    <span class="card-text">${firstWords({ ...node, text }) || "…"}</span>
  </div>`;
}

/** @param {{place: Place, isChosen: boolean, isOnPath: boolean}} props */
function Card({ place, isChosen, isOnPath }) {
  const { node, x, y, hidden } = place;
  const labels = labelsOf(place);
  const kind = `card ${node.role} warm-${node.warmth}${isChosen ? " chosen" : ""}${isOnPath ? " on-path" : ""}`;
  const going = node.goingOn;
  const cost = going === null ? "" : going.seconds === null ? `${count(going.to_compute)} tok` : duration(going.seconds);
  const title = going === null ? "" : `Going on here: ${goingText(going)}`;
  return html`<div
    id=${`node-${node.id}`}
    class=${kind}
    role="treeitem"
    aria-level=${node.depth + 1}
    aria-selected=${isChosen}
    aria-expanded=${node.children.length ? hidden === 0 : undefined}
    title=${title}
    style=${{ transform: `translate(${x - CARD.width / 2}px, ${y}px)` }}
    onClick=${() => {
      select(node.id);
      state.shown.value = "tree";
    }}
    onDblClick=${() => (state.shown.value = "path")}
  >
    <span class="card-who">${speaker(node)}</span>
    <span class=${(going?.seconds ?? 0) >= DEAR_S ? "card-cost dear" : "card-cost"}>${cost}</span>
    <span class="card-text">${firstWords(node) || "…"}</span>
    ${labels.length > 0 &&
    html`<span class="labels">
      ${labels.slice(0, MOST_LABELS).map(
        (one) => html`<b key=${one.kind + one.name} class=${one.kind}>${one.name}</b>`,
      )}
    </span>`}
    ${node.children.length > 0 &&
    html`<button
      type="button"
      tabindex="-1"
      class=${hidden ? "fold folded" : "fold"}
      aria-label=${hidden ? `Unfold ${hidden} messages` : "Fold what follows"}
      onClick=${(/** @type {Event} */ event) => {
        event.stopPropagation();
        toggle(node.id);
      }}
    >
      ${hidden ? `+${hidden}` : "−"}
    </button>`}
  </div>`;
}

/**
 * @param {Place[]} dots
 * @param {boolean} areSmall Whether all are dots, and lie where cards would begin.
 */
function dotPaths(dots, areSmall) {
  /** @type {Record<string, string[]>} */
  const kinds = {};
  for (const { node, x, y } of dots) {
    (kinds[`${node.role === "user" ? "asked" : "said"} warm-${node.warmth}`] ??= []).push(`M${x},${y + (areSmall ? 0 : CARD.height / 2)}h.01`);
  }
  return Object.entries(kinds).map(([kind, parts]) => html`<path key=${kind} class=${`dots ${kind}`} d=${parts.join("")} />`);
}

/**
 * @param {KeyboardEvent} event
 * @returns {string | null} The message that a key leads to.
 */
function keyTarget(event) {
  const tree = state.tree.value;
  const node = tree.nodes.get(state.selected.value ?? "");
  if (!node) return tree.roots[0] ?? null;
  const beside = siblings(tree, node);
  const number = beside.indexOf(node.id);
  if (event.key === "ArrowUp") return node.parent;
  if (event.key === "ArrowDown") return state.folded.value.has(node.id) ? null : (node.children.at(-1) ?? null);
  if (event.key === "ArrowLeft") return beside[number - 1] ?? null;
  if (event.key === "ArrowRight") return beside[number + 1] ?? null;
  if (event.key === "Home") return tree.roots[0] ?? null;
  if (event.key === "End") return newestBelow(tree, node.id);
  return null;
}

export function TreeView() {
  const frame = useRef(/** @type {HTMLElement | null} */ (null));
  const [at, setAt] = useState(zoomIdentity);
  const sight = useRef(zoomIdentity); // at once, where `at` follows with the next drawing
  const legend = useRef(/** @type {HTMLElement | null} */ (null));
  const [room, setRoom] = useState({ width: 0, height: 0, open: 0 }); // `open`: of the height, above the legend
  const isMoved = useRef(false);
  const behaviour = useMemo(() => zoom().scaleExtent(SCALES).duration(0), []);
  const tree = state.tree.value;
  const folded = state.folded.value;
  const aside = state.aside.value;
  const sprouts = state.sprouts.value;
  const places = useMemo(
    () => layout(withSprouts(tree, JSON.parse(sprouts)), folded, aside),
    [tree, folded, aside, sprouts],
  );
  const chosen = state.selected.value;
  const onPath = useMemo(() => new Set(state.path.value.map((node) => node.id)), [state.path.value]);

  useEffect(() => {
    const element = /** @type {HTMLElement} */ (frame.current);
    const moved = (/** @type {any} */ event) => {
      if (event.sourceEvent) isMoved.current = true;
      sight.current = event.transform;
      setAt(event.transform);
    };
    behaviour.on("zoom", moved).filter((event) => !event.button && event.type !== "dblclick");
    selectElement(element).call(/** @type {any} */ (behaviour));
    const measure = new ResizeObserver(() =>
      setRoom({
        ...{ width: element.clientWidth, height: element.clientHeight },
        open: legend.current?.offsetTop || element.clientHeight,
      }),
    );
    measure.observe(element);
    return () => measure.disconnect();
  }, []);

  /**
   * @param {{x: number, y: number}} middle
   * @param {number} scale
   * @param {number} time
   */
  function lookAt(middle, scale, time = 220) {
    const element = /** @type {HTMLElement} */ (frame.current);
    const { width, open } = room;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const from = { ...middleOf(sight.current), scale: sight.current.k };
    glide(element, still ? 0 : time, (part) => {
      /** @type {(from: number, to: number) => number} */
      const between = (from, to) => from + part * (to - from);
      // A scale by its logarithm, so that near and far pass equally fast.
      const now = part === 1 ? scale : from.scale * (scale / from.scale) ** part;
      const [x, y] = [between(from.x, middle.x), between(from.y, middle.y)];
      const target = zoomIdentity.translate(width / 2 - x * now, open / 2 - y * now).scale(now);
      selectElement(element).call(/** @type {any} */ (behaviour.transform), target);
    });
  }

  /** @param {typeof zoomIdentity} sight @returns {{x: number, y: number}} What is in the middle of the view. */
  function middleOf(sight) {
    const [x, y] = sight.invert([room.width / 2, room.open / 2]);
    return { x, y };
  }

  /**
   * Move a middle so that the view shows the tree, where there is more of it, and not what is empty beside it.
   *
   * @param {{x: number, y: number}} middle
   * @param {ReturnType<typeof extent>} box
   * @param {number} scale
   */
  function inside(middle, box, scale) {
    /** @type {(at: number, low: number, high: number) => number} */
    const between = (at, low, high) => (low > high ? (low + high) / 2 : Math.min(Math.max(at, low), high));
    const [x, y] = [room.width / 2 / scale - MARGIN, room.open / 2 / scale - MARGIN];
    return {
      x: between(middle.x, box.left + x, box.right - x),
      y: between(middle.y, box.top + y, box.bottom - y),
    };
  }

  /** @param {number} time */
  function fit(time = 220) {
    if (places.size === 0 || room.width === 0) return;
    const box = extent(places.values());
    const scale = Math.min(
      1,
      (room.width - 2 * MARGIN) / (box.right - box.left),
      (room.open - 2 * MARGIN) / (box.bottom - box.top + 30),
    );
    lookAt({ x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2 + 8 }, scale, time);
  }

  function showAll() {
    isMoved.current = false;
    fit();
  }

  // Until a person moves it, the view follows: the whole tree where it can be read so, and else what is chosen.
  const opened = useRef("");
  useEffect(() => {
    if (!tree.id || room.width === 0 || places.size === 0 || (chosen === null && !state.isOpening.value && sprouts === "[]")) return;
    const isNew = opened.current !== tree.id;
    if (isNew) isMoved.current = false;
    opened.current = tree.id;
    if (isMoved.current) return;
    const box = extent(places.values());
    const fits = Math.min(room.width / (box.right - box.left + 80), room.open / (box.bottom - box.top + 80));
    const place = places.get(chosen ?? "");
    if (fits >= 0.6 || !place) fit(isNew ? 0 : 300);
    else lookAt(inside({ x: place.x, y: place.y + CARD.height / 2 }, box, 0.85), 0.85, isNew ? 0 : 300);
  }, [tree.id, room, places, chosen === null]);

  /** Have what is chosen come into sight. */
  function reveal() {
    const place = places.get(chosen ?? "");
    if (!place || room.width === 0 || opened.current !== tree.id) return;
    const now = sight.current;
    const [x, y] = now.apply([place.x, place.y]);
    const half = (CARD.width / 2) * now.k;
    const isSeen = x - half > 0 && x + half < room.width && y > 0 && y + CARD.height * now.k + 20 < room.open;
    const scale = Math.max(now.k, 0.6);
    if (!isSeen) lookAt(inside({ x: place.x, y: place.y + CARD.height / 2 }, extent(places.values()), scale), scale);
  }
  useEffect(reveal, [chosen]);

  const box = {
    left: -at.x / at.k,
    top: -at.y / at.k,
    right: (room.width - at.x) / at.k,
    bottom: (room.height - at.y) / at.k,
  };
  const { cards, dots } = seen(places, box, at.k, elements, onPath);
  const areDots = at.k < DOTS_BELOW;
  const drawn = [...cards, ...dots];
  cards.sort((a, b) => a.y - b.y || a.x - b.x);
  const move = `translate(${at.x}px, ${at.y}px) scale(${at.k})`;

  /** @param {MouseEvent} event */
  function onDot(event) {
    if (!areDots || !frame.current || event.defaultPrevented) return;
    const corner = frame.current.getBoundingClientRect();
    const [x, y] = at.invert([event.clientX - corner.left, event.clientY - corner.top]);
    /** @type {Place | null} */
    let nearest = null;
    let least = 24 / at.k;
    for (const one of dots) {
      if (one.node.isSprout) continue;
      const far = Math.hypot(one.x - x, one.y - y);
      if (far < least) [nearest, least] = [one, far];
    }
    if (nearest) select(/** @type {Place} */ (nearest).node.id);
  }

  /** @param {KeyboardEvent} event */
  function onKey(event) {
    if (event.key === " " && chosen) toggle(chosen);
    else if (event.key === "Enter") {
      state.shown.value = "path";
      document.getElementById("question")?.focus();
    } else if (event.key === "+" || event.key === "=") zoomBy(1.3);
    else if (event.key === "-") zoomBy(1 / 1.3);
    else if (event.key === "0") showAll();
    else {
      const target = keyTarget(event);
      if (target === null) return;
      if (target === chosen) reveal();
      else select(target);
    }
    event.preventDefault();
  }

  /** @param {number} factor */
  function zoomBy(factor) {
    const [least, most] = SCALES;
    isMoved.current = true;
    lookAt(middleOf(sight.current), Math.min(most, Math.max(least, sight.current.k * factor)), 120);
  }

  const isChosenDrawn = cards.some((one) => one.node.id === chosen);
  const chosenPlace = places.get(chosen ?? "");
  return html`<section class="tree" aria-label="Tree">
    <div
      class="tree-frame"
      ref=${frame}
      role="tree"
      tabindex="0"
      aria-label="All messages of this conversation. Arrow keys move, space folds, Enter asks."
      aria-activedescendant=${isChosenDrawn ? `node-${chosen}` : undefined}
      onKeyDown=${onKey}
      onClick=${onDot}
    >
      <svg class="lines" aria-hidden="true">
        <g style=${{ transform: move }}>
          <path class="line" d=${lines(places, drawn, areDots)} />
          <path class="line on-path" d=${lines(places, drawn.filter((one) => onPath.has(one.node.id)), areDots)} />
          ${dotPaths(dots, areDots)}
          ${areDots && chosenPlace && html`<circle class="here" cx=${chosenPlace.x} cy=${chosenPlace.y} r=${9 / at.k} />`}
        </g>
      </svg>
      <div class="cards" role="presentation" style=${{ transform: move }}>
        ${cards.map(
          (place) =>
            place.node.isSprout
              ? html`<${Sprout} key=${place.node.id} place=${place} />`
              : html`<${Card} key=${place.node.id} place=${place} isChosen=${place.node.id === chosen} isOnPath=${onPath.has(place.node.id)} />`,
        )}
      </div>
    </div>
    ${tree.nodes.size === 0 && !state.isOpening.value && !state.growing.value.length && html`<p class="empty">Ask something, and the tree begins to grow.</p>`}
    <div class="tree-tools">
      <${IconButton} icon="plus" label="Zoom in" onClick=${() => zoomBy(1.3)} />
      <button type="button" class="icon-button" aria-label="Zoom out" title="Zoom out" onClick=${() => zoomBy(1 / 1.3)}>−</button>
      <${IconButton} icon="fit" label="Show all" onClick=${showAll} />
    </div>
    <p class="legend" ref=${legend}>
      ${Object.entries(WARMTHS).map(([kind, name]) => html`<span key=${kind}><i class=${`dot ${kind}`}></i>${name}</span>`)}
    </p>
  </section>`;
}
