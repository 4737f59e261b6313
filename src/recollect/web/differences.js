/**
 * Which words of two texts differ, by Myers' algorithm. Pure.
 *
 * Source: E. W. Myers, An O(ND) Difference Algorithm and Its Variations, 1986.
 */

/** Beyond so many edits two texts have nothing to do with each other, and are not compared further. */
const MOST_EDITS = 1500;

/** @typedef {{kind: "same" | "less" | "more", text: string}} Run */

/**
 * @param {string} before
 * @param {string} after
 * @returns {Run[]} What is the same, what only the first has, and what only the second has, in order.
 */
export function differences(before, after) {
  const a = before.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
  const b = after.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
  const steps = shortest(a, b);
  if (steps === null) return joined([["less", before], ["more", after]]);
  return joined(steps);
}

/**
 * @param {string[]} a
 * @param {string[]} b
 * @returns {[Run["kind"], string][] | null} null: it takes too many edits.
 */
function shortest(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  /** How far each diagonal got; diagonal k is at `middle + k`. */
  const reach = new Int32Array(2 * most + 3);
  const middle = most + 1;
  /** Of the diagonals from -edits - 1 to edits + 1, as they were before each edit. @type {Int32Array[]} */
  const trace = [];
  for (let edits = 0; edits <= most; edits += 1) {
    trace.push(reach.slice(middle - edits - 1, middle + edits + 2));
    for (let k = -edits; k <= edits; k += 2) {
      const at = middle + k;
      const down = k === -edits || (k !== edits && reach[at - 1] < reach[at + 1]);
      let x = down ? reach[at + 1] : reach[at - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x += 1;
      reach[at] = x;
      if (x >= a.length && x - k >= b.length) return back(trace, a, b);
    }
  }
  return null;
}

/**
 * @param {Int32Array[]} trace
 * @param {string[]} a
 * @param {string[]} b
 */
function back(trace, a, b) {
  /** @type {[Run["kind"], string][]} */
  const steps = [];
  let [x, y] = [a.length, b.length];
  for (let edits = trace.length - 1; edits >= 0; edits -= 1) {
    const reach = trace[edits];
    const k = x - y;
    const at = k + edits + 1;
    const down = k === -edits || (k !== edits && reach[at - 1] < reach[at + 1]);
    const fromK = down ? k + 1 : k - 1;
    const fromX = edits === 0 ? 0 : reach[down ? at + 1 : at - 1];
    const fromY = edits === 0 ? 0 : fromX - fromK;
    while (x > fromX && y > fromY) {
      steps.push(["same", a[x - 1]]);
      [x, y] = [x - 1, y - 1];
    }
    if (edits === 0) break;
    steps.push(down ? ["more", b[fromY]] : ["less", a[fromX]]);
    [x, y] = [fromX, fromY];
  }
  return steps.reverse();
}

/**
 * One side of a difference; space between two words that differ is marked with them, as one reads it.
 *
 * @param {Run[]} runs
 * @param {"less" | "more"} kind What only this side has.
 * @returns {Run[]}
 */
export function sideOf(runs, kind) {
  const own = runs.filter((run) => run.kind === "same" || run.kind === kind);
  /** @type {(run: Run, at: number) => boolean} */
  const isBetween = (run, at) => !run.text.trim() && own[at - 1]?.kind === kind && own[at + 1]?.kind === kind;
  return joined(own.map((run, at) => [isBetween(run, at) ? kind : run.kind, run.text]));
}

/**
 * @param {[Run["kind"], string][]} steps
 * @returns {Run[]}
 */
function joined(steps) {
  /** @type {Run[]} */
  const runs = [];
  for (const [kind, text] of steps) {
    const last = runs.at(-1);
    if (last?.kind === kind) last.text += text;
    else runs.push({ kind, text });
  }
  return runs;
}
