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
});
const LANGUAGES = new Set([
  ...["bash", "cpp", "diff", "go", "java", "javascript", "json", "markdown", "python", "rust", "xml"],
  "yaml",
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

/**
 * @param {string} code
 * @param {string} language As the text names it.
 */
function coloured(code, language) {
  const name = NAMES[language] ?? language;
  if (!LANGUAGES.has(name)) return escape(code);
  if (highlighter.getLanguage(name)) return highlighter.highlight(code, { language: name }).value;
  load(name);
  return escape(code);
}

const parser = new Marked({
  gfm: true,
  breaks: true,
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

/** @param {string} text @returns {string} HTML, not yet sanitized. */
function parsed(text) {
  if (text.length <= MOST_CHARACTERS) {
    try {
      return /** @type {string} */ (parser.parse(text));
    } catch {
      // What is nested thousands of levels deep is too much for the parser's stack.
    }
  }
  return `<pre tabindex="0">${escape(text)}</pre>`;
}

/** @param {string} text */
export function render(text) {
  return purifier.sanitize(parsed(text), {
    RETURN_TRUSTED_TYPE: true,
    ALLOWED_TAGS: [
      ...["p", "br", "hr", "a", "strong", "em", "del", "code", "pre", "blockquote", "span", "div", "button"],
      ...["ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
    ],
    ALLOWED_ATTR: ["href", "class", "start", "align", "type", "tabindex"],
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

/** A text as Markdown. @type {(props: {text: string}) => any} */
export const Markdown = memo(
  /** @param {{text: string}} props */
  ({ text }) => {
    const ref = useRef(/** @type {HTMLElement | null} */ (null));
    const drawn = useRef({ at: -Infinity, took: 0 });
    const version = loaded.value;
    useEffect(() => {
      const draw = () => {
        if (!ref.current) return;
        const at = performance.now();
        ref.current.innerHTML = render(text);
        drawn.current = { at, took: performance.now() - at };
      };
      // A text that grows is drawn anew as a whole: the longer that takes, the more seldom.
      const wait = drawn.current.at + REST * drawn.current.took - performance.now();
      if (wait <= 0) return void draw();
      const timer = setTimeout(draw, wait);
      return () => clearTimeout(timer);
    }, [text, version]);
    return html`<div class="markdown" ref=${ref} onClick=${onClick}></div>`;
  },
);
