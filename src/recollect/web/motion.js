/**
 * Moves of the view that take a moment.
 *
 * The import map has d3-zoom find this in place of d3-transition and d3-interpolate, which with what they
 * need are a tenth of the page, and of which it uses only what ends a move that is under way.
 */

import { selection } from "d3-selection";

/** The next frame of each element that moves. @type {WeakMap<Element, number>} */
const frames = new WeakMap();

/**
 * End the move of an element where it is, as d3-zoom does once a person moves it.
 *
 * @param {Element} element
 */
export function interrupt(element) {
  cancelAnimationFrame(frames.get(element) ?? 0);
  frames.delete(element);
}

// What d3-zoom does itself, each frame of a move among it, ends no move.
/** @type {any} */ (selection.prototype).interrupt = function () {
  return this;
};

/** d3-zoom moves nothing by itself here, so it never asks for what lies between. */
export const interpolateZoom = undefined;

/**
 * Move an element, slowly at first and at last; a move that is under way ends.
 *
 * @param {Element} element
 * @param {number} time Milliseconds; 0: at once.
 * @param {(part: number) => void} put Told how much of the way is done, 1 at last.
 */
export function glide(element, time, put) {
  interrupt(element);
  if (time === 0) return put(1);
  const begun = performance.now();
  const step = () => {
    const part = Math.min(1, (performance.now() - begun) / time);
    if (part < 1) frames.set(element, requestAnimationFrame(step));
    put(part * part * (3 - 2 * part));
  };
  step();
  return undefined;
}
