/**
 * Markdown as elements, for text that may come from anybody.
 *
 * HTML in it is shown as text, pictures are links, and what comes out of the parser passes a sanitizer,
 * without which this page's security policy lets nothing become an element.
 */

import { copyText, html } from "./widgets.js";
import { tell } from "./state.js";
import { memo } from "./memo.js";
import { useEffect, useRef } from "preact/hooks";
import { signal } from "@preact/signals";
import { Marked } from "marked";
import highlighter from "highlight.js";
import "dompurify";

/** @type {{sanitize: (text: string, options: object) => any, addHook: (name: string, hook: (node: Element) => void) => void}} */
const purifier = /** @type {any} */ (globalThis).DOMPurify;

const NAMES = /** @type {Record<string, string>} */ ({
  ...{ sh: "bash", shell: "bash", zsh: "bash", console: "bash", js: "javascript", jsx: "javascript" },
  ...{ ts: "javascript", tsx: "javascript", typescript: "javascript", py: "python", rs: "rust", yml: "yaml" },
  ...{ html: "xml", svg: "xml", md: "markdown", c: "cpp", "c++": "cpp", h: "cpp", golang: "go", patch: "diff" },
  ...{ sqlite: "sql", postgresql: "sql", mysql: "sql" },
});
const LANGUAGES = new Set([
  ...["bash", "cpp", "diff", "go", "java", "javascript", "json", "markdown", "python", "rust", "sql"],
  ...["xml", "yaml"],
]);
/** Counts languages that have been loaded: what was shown without colours is drawn again. */
const loaded = signal(0);
const asked = new Set();

/** @param {string} text */
const escape = (text) =>
  text.replace(/[&<>"']/g, (one) => `&#${one.charCodeAt(0)};`);

/** @param {string} name */
function load(name) {
  if (asked.has(name)) return;
  asked.add(name);
  import(`./vendor/languages/${name}.js`).then((module) => {
    highlighter.registerLanguage(name, module.default);
    loaded.value += 1;
  });
}

/** A line that nobody has written; some languages are searched for by the square of its length. */
const LONG_LINE = /.{2000}/;

/**
 * @param {string} code
 * @param {string} language As the text names it.
 */
function coloured(code, language) {
  const name = NAMES[language] ?? language;
  if (!LANGUAGES.has(name) || LONG_LINE.test(code)) return escape(code);
  if (highlighter.getLanguage(name)) return highlighter.highlight(code, { language: name }).value;
  load(name);
  return escape(code);
}

/**
 * Characters that the parser may go through in search of the ends of emphasis: from each mark it goes to the
 * end of the paragraph, which for a long one of marks alone takes minutes. Marks beyond that are text.
 */
const MOST_SEARCHED = 2_000_000;
let searched = 0;

/** A line that begins with more marks of quotations and lists than the parser's stack holds. */
const TOO_DEEP = /^(?:[ \t]*(?:>|[-*+]|\d{1,9}[.)])[ \t]?){100}/m;

const parser = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: {
    emStrong(text) {
      if (text[0] === "*" || text[0] === "_") searched += text.length;
      return searched > MOST_SEARCHED ? undefined : false; // false: as the parser has it
    },
  },
  renderer: {
    code({ text, lang }) {
      const language = (lang ?? "").trim().split(/\s/)[0].toLowerCase();
      const label = language ? `<span>${escape(language)}</span>` : "<span></span>";
      return (
        `<div class="code"><div class="code-head">${label}<button type="button" class="copy">Copy</button></div>` +
        `<pre tabindex="0"><code>${coloured(text, language)}</code></pre></div>`
      );
    },
    html({ text }) {
      return escape(text);
    },
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
  },
});

purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

/** Longer texts are shown as they are: a browser would take seconds for their elements. */
const MOST_CHARACTERS = 60_000;

/**
 * A text as HTML, not yet sanitized: by itself, as open, the last of its blocks (paragraphs, lists and so
 * on), since what is said next may still be part of it, and all from the first address of a link on, since
 * it may be used later.
 *
 * @param {string} text
 * @returns {{settled: string, open: string, taken: number}} `taken`: the characters of the settled blocks.
 */
function parsed(text) {
  if (text.length <= MOST_CHARACTERS && !TOO_DEEP.test(text)) {
    searched = 0;
    try {
      const tokens = parser.lexer(text);
      const last = tokens.findLastIndex((one) => one.type !== "space");
      const address = tokens.findIndex((one) => one.type === "def"); // of links in what comes after it
      const settled = tokens.slice(0, Math.max(0, address < 0 ? last : Math.min(address, last)));
      const raw = settled.map((one) => one.raw).join("");
      if (!text.startsWith(raw)) return { settled: "", open: parser.parser(tokens), taken: 0 };
      const open = parser.parser(tokens.slice(settled.length));
      return { settled: parser.parser(settled), open, taken: raw.length };
    } catch {
      // What is nested thousands of levels deep is too much for the parser's stack.
    }
  }
  return { settled: "", open: `<pre tabindex="0">${escape(text)}</pre>`, taken: 0 };
}

/** Attributes in which no address is looked for. */
const NO_ADDRESSES = ["start", "align", "type", "tabindex"];

/** @param {string} text HTML. */
function sanitized(text) {
  return purifier.sanitize(text, {
    RETURN_TRUSTED_TYPE: true,
    ALLOWED_TAGS: [
      ...["p", "br", "hr", "a", "strong", "em", "del", "code", "pre", "blockquote", "span", "div", "button"],
      ...["ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
    ],
    ALLOWED_ATTR: ["href", "class", ...NO_ADDRESSES],
    ADD_URI_SAFE_ATTR: NO_ADDRESSES,
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  });
}

/** @param {MouseEvent} event */
function onClick(event) {
  const button = /** @type {Element} */ (event.target).closest("button.copy");
  if (!button) return;
  const code = button.closest(".code")?.querySelector("code")?.textContent ?? "";
  void copyText(code).then(
    () => {
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    },
    tell,
  );
}

/** Of the time for which a text that grows is not drawn, how many times as long drawing it took. */
const REST = 5;
/** A block that grows is drawn anew once it has grown by this part, or after so many milliseconds. */
const GROWN = 1 / 16;
const PAUSE = 200;

/**
 * What is drawn of a text: `taken` of its characters for good, in the first `nodes` nodes.
 *
 * @typedef {{text: string, version: number, taken: number, nodes: number, at: number, took: number}} Drawn
 */

/**
 * Draw a text; of one that has grown, only the block that was open and what came after it.
 *
 * Words that a later block makes a link are one once the whole text is drawn.
 *
 * @param {HTMLElement} element
 * @param {Drawn} before
 * @param {string} text
 * @param {number} version
 * @returns {Drawn}
 */
function draw(element, before, text, version) {
  const at = performance.now();
  const grows = version === before.version && text.startsWith(before.text) && text.length <= MOST_CHARACTERS;
  let { taken, nodes } = grows ? before : NOTHING;
  const found = parsed(text.slice(taken));
  while (element.childNodes.length > nodes) element.lastChild?.remove();
  element.insertAdjacentHTML("beforeend", sanitized(found.settled));
  nodes = element.childNodes.length;
  element.insertAdjacentHTML("beforeend", sanitized(found.open));
  taken += found.taken;
  return { text, version, taken, nodes, at, took: performance.now() - at };
}

/** @type {Drawn} */
const NOTHING = { text: "", version: 0, taken: 0, nodes: 0, at: -Infinity, took: 0 };

/** A text as Markdown. @type {(props: {text: string}) => any} */
export const Markdown = memo(
  /** @param {{text: string}} props */
  ({ text }) => {
    const ref = useRef(/** @type {HTMLElement | null} */ (null));
    const drawn = useRef(NOTHING);
    const version = loaded.value;
    const said = text.replace(/\r\n?/g, "\n"); // as the parser reads it
    useEffect(() => {
      const { text: before, taken, at, took } = drawn.current;
      const now = () => {
        if (ref.current) drawn.current = draw(ref.current, drawn.current, said, version);
      };
      const isLittle = said.length - before.length < GROWN * (before.length - taken);
      const wait = at + Math.max(REST * took, isLittle ? PAUSE : 0) - performance.now();
      if (wait <= 0) return void now();
      const timer = setTimeout(now, wait);
      return () => clearTimeout(timer);
    }, [said, version]);
    return html`<div class="markdown" ref=${ref} onClick=${onClick}></div>`;
  },
);
