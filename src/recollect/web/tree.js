/**
 * The tree of a conversation as a value: read from the API, laid out, and cut to what is drawn.
 *
 * Pure: no element, no request.
 */

import { hierarchy, tree as tidy } from "d3-hierarchy";

/**
 * @typedef {import("./types").ApiTree} ApiTree
 * @typedef {import("./types").ApiNode} ApiNode
 * @typedef {import("./types").Tree} Tree
 * @typedef {import("./types").TreeNode} TreeNode
 * @typedef {import("./types").Place} Place
 */

/** The size of a card, and how far cards are from each other. */
export const CARD = { width: 208, height: 74 };
const STEP = { x: 232, y: 122 };

/** Most elements that are drawn of a tree at a time. */
const MOST_ELEMENTS = 300;
/** Below this scale nobody can read a card, so that messages are dots. */
export const DOTS_BELOW = 0.45;

/** @type {Tree} */
export const EMPTY = readTree({ id: "", nodes: [], tips: {}, checkpoints: {} });

/**
 * @param {ApiNode} node
 * @returns {TreeNode}
 */
function readNode(node) {
  /** @param {string} type */
  const texts = (type) =>
    node.items
      .filter((item) => item.type === type)
      .map((item) => (item.content ?? []).map((part) => part.text ?? "").join(""))
      .join("\n");
  const results = node.items.filter((item) => item.type === "function_call_output");
  return {
    id: node.id,
    role: node.role,
    parent: node.parent_id,
    children: [],
    depth: 0,
    text: results.length ? results.map((item) => item.output ?? "").join("\n") : texts("message"),
    reasoning: texts("reasoning"),
    calls: node.items
      .filter((item) => item.type === "function_call")
      .map((item) => ({ id: item.call_id ?? "", name: item.name ?? "", arguments: item.arguments ?? "" })),
    items: node.items.map((item) => item.id),
    responseId: node.response_id,
    createdAt: node.created_at,
    usage: node.usage ?? null,
    finishReason: node.finish_reason ?? null,
    goingOn: node.going_on ?? null,
    warmth: node.warmth ?? "none",
  };
}

/**
 * @param {ApiTree} body
 * @returns {Tree}
 */
export function readTree(body) {
  /** @type {Tree} */
  const found = {
    ...{ id: body.id, nodes: new Map(), roots: [], tips: body.tips, checkpoints: body.checkpoints },
    ...{ branchesBy: byPlace(body.tips), checkpointsBy: byPlace(body.checkpoints) },
  };
  for (const one of body.nodes) {
    const node = readNode(one);
    const parent = node.parent === null ? undefined : found.nodes.get(node.parent);
    node.depth = parent ? parent.depth + 1 : 0;
    (parent ? parent.children : found.roots).push(node.id);
    found.nodes.set(node.id, node);
  }
  return found;
}

/** @param {Record<string, string | null>} places @returns {Map<string | null, string[]>} The names at each. */
function byPlace(places) {
  /** @type {Map<string | null, string[]>} */
  const found = new Map();
  for (const [name, id] of Object.entries(places)) {
    const names = found.get(id);
    if (names) names.push(name);
    else found.set(id, [name]);
  }
  return found;
}

/**
 * @param {Tree} tree
 * @param {string | null} id
 * @returns {TreeNode[]} The messages from the first one to this one.
 */
export function pathTo(tree, id) {
  const path = [];
  for (let node = tree.nodes.get(id ?? ""); node; node = tree.nodes.get(node.parent ?? "")) path.push(node);
  return path.reverse();
}

/**
 * @param {Tree} tree
 * @param {string | null} id
 * @returns {string[]} The branches that stand at a node.
 */
export function branchesAt(tree, id) {
  return tree.branchesBy.get(id) ?? [];
}

/**
 * @param {Tree} tree
 * @param {string | null} id
 * @returns {string[]} The checkpoints at a node.
 */
export function checkpointsAt(tree, id) {
  return tree.checkpointsBy.get(id) ?? [];
}

/**
 * @param {Tree} tree
 * @param {TreeNode} node
 * @returns {string[]} The messages that were said after the same one, itself among them.
 */
export function siblings(tree, node) {
  return node.parent === null ? tree.roots : (tree.nodes.get(node.parent)?.children ?? []);
}

/**
 * @param {Tree} tree
 * @param {string} id
 * @returns {string} Where one arrives who always goes on with what was said last.
 */
export function newestBelow(tree, id) {
  for (;;) {
    const next = tree.nodes.get(id)?.children.at(-1);
    if (next === undefined) return id;
    id = next;
  }
}

/**
 * @param {Tree} tree
 * @param {string} id
 * @returns {number} How many messages are below one.
 */
function countBelow(tree, id) {
  let count = 0;
  const ahead = [...(tree.nodes.get(id)?.children ?? [])];
  for (let one = ahead.pop(); one !== undefined; one = ahead.pop()) {
    count += 1;
    ahead.push(...(tree.nodes.get(one)?.children ?? []));
  }
  return count;
}

/**
 * Return a tree with what is being said in it: questions that the server does not have yet, and replies.
 *
 * @param {Tree} tree
 * @param {{id: string, parent: string | null, branch: string, question: string | null}[]} sprouts
 * @returns {Tree}
 */
export function withSprouts(tree, sprouts) {
  if (sprouts.length === 0) return tree;
  const grown = { ...tree, nodes: new Map(tree.nodes), roots: [...tree.roots] };
  /** @type {(role: "user" | "assistant", id: string, parent: string | null, text: string) => void} */
  const add = (role, id, parent, text) => {
    const above = grown.nodes.get(parent ?? "");
    const item = { id, role, parent_id: parent, items: [], response_id: null, created_at: 0 };
    grown.nodes.set(id, { ...readNode(item), text, depth: above ? above.depth + 1 : 0, isSprout: true });
    if (above) grown.nodes.set(above.id, { ...above, children: [...above.children, id] });
    else grown.roots.push(id);
  };
  for (const { id, parent, branch, question } of sprouts) {
    const tip = tree.nodes.get(tree.tips[branch] ?? "");
    const isKept = tip?.role === "user" && tip.parent === parent;
    const isDone = tip?.role === "assistant" && tip.id !== parent; // the reply is there already
    const isLonger = question === null && tree.nodes.get(parent ?? "")?.role === "assistant";
    if (isDone || isLonger || (parent !== null && !tree.nodes.has(parent))) continue;
    if (question !== null && !isKept) add("user", `${id}-asked`, parent, question);
    add("assistant", id, isKept ? tip.id : question === null ? parent : `${id}-asked`, "");
  }
  return grown;
}

/**
 * Give every message that is not folded away a place: downward, replies under what they answer.
 *
 * @param {Tree} tree
 * @param {Set<string>} folded Below these nothing is drawn.
 * @param {Set<string>} aside These are not drawn either.
 * @returns {Map<string, Place>} Parents first.
 */
export function layout(tree, folded, aside = new Set()) {
  /** @type {Map<string, Place>} */
  const places = new Map();
  if (tree.roots.length === 0) return places;
  // Node by node: given a whole tree, `hierarchy` takes time by the square of its depth, for heights.
  /** @type {(data: TreeNode | null, parent: any) => any} */
  const below = (data, parent) => {
    const one = Object.assign(hierarchy(data, () => null), { parent, depth: parent ? parent.depth + 1 : 0 });
    if (parent) (parent.children ??= []).push(one);
    return one;
  };
  const top = below(null, null);
  const known = new Map();
  for (const node of tree.nodes.values()) {
    const parent = tree.nodes.has(node.parent ?? "") ? known.get(node.parent) : top;
    if (parent && !folded.has(node.parent ?? "") && !aside.has(node.id)) known.set(node.id, below(node, parent));
  }
  const placed = tidy().nodeSize([STEP.x, STEP.y]).separation(() => 1)(top);
  placed.each((one) => {
    const node = /** @type {TreeNode | null} */ (one.data);
    if (node === null) return;
    const away = aside.size ? node.children.filter((id) => aside.has(id)) : [];
    const hidden = folded.has(node.id)
      ? countBelow(tree, node.id)
      : away.reduce((sum, id) => sum + 1 + countBelow(tree, id), 0);
    places.set(node.id, { node, x: one.x, y: one.y - STEP.y, hidden });
  });
  return places;
}

/**
 * @param {Iterable<Place>} places
 * @returns {{left: number, top: number, right: number, bottom: number}} What they cover.
 */
export function extent(places) {
  const box = { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity };
  for (const { x, y } of places) {
    box.left = Math.min(box.left, x - CARD.width / 2);
    box.right = Math.max(box.right, x + CARD.width / 2);
    box.top = Math.min(box.top, y);
    box.bottom = Math.max(box.bottom, y + CARD.height);
  }
  return box;
}

/**
 * Return which messages are drawn as cards, and which as dots, in a part of the tree.
 *
 * @param {Map<string, Place>} places
 * @param {{left: number, top: number, right: number, bottom: number}} box What is seen, in the tree's units.
 * @param {number} scale
 * @param {(place: Place) => number} costs How many elements a card takes.
 * @param {Set<string>} first Which cards come before others where not all can be drawn.
 * @returns {{cards: Place[], dots: Place[]}}
 */
export function seen(places, box, scale, costs, first) {
  const inside = [];
  for (const place of places.values()) {
    const isInside =
      place.x + CARD.width / 2 > box.left &&
      place.x - CARD.width / 2 < box.right &&
      place.y + STEP.y > box.top &&
      place.y - STEP.y / 2 < box.bottom;
    if (isInside) inside.push(place);
  }
  if (scale < DOTS_BELOW) return { cards: [], dots: inside };
  const middle = { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2 };
  /** @param {Place} one */
  const far = (one) =>
    (first.has(one.node.id) ? 0 : 1e6) + Math.hypot(one.x - middle.x, one.y - middle.y);
  const order = inside.map((one) => ({ one, far: far(one) })).sort((a, b) => a.far - b.far);
  let left = MOST_ELEMENTS - OTHER_ELEMENTS;
  /** @type {Place[]} */
  const cards = [];
  /** @type {Place[]} */
  const dots = [];
  for (const { one } of order) {
    left -= costs(one);
    (left >= 0 ? cards : dots).push(one);
  }
  return { cards, dots };
}

/** Of the drawing, besides cards: lines, dots of all kinds, and what they are in. */
const OTHER_ELEMENTS = 16;

/**
 * Return the lines from messages to what follows them, as one path for all.
 *
 * @param {Map<string, Place>} places
 * @param {Iterable<Place>} ends Their lines upward are drawn.
 * @param {boolean} areDots
 */
export function lines(places, ends, areDots) {
  const down = areDots ? 0 : CARD.height;
  const parts = [];
  for (const { node, x, y } of ends) {
    const from = places.get(node.parent ?? "");
    if (!from) continue;
    const start = from.y + down;
    const half = (start + y) / 2;
    parts.push(
      from.x === x
        ? `M${x},${start}V${y}`
        : `M${from.x},${start}C${from.x},${half} ${x},${half} ${x},${y}`,
    );
  }
  return parts.join("");
}
