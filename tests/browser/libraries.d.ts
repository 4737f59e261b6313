/** Libraries of the page that come without types. */
declare module "highlight.js" {
  const highlighter: {
    registerLanguage(name: string, grammar: unknown): void;
    getLanguage(name: string): unknown;
    highlight(code: string, options: { language: string }): { value: string };
  };
  export default highlighter;
}
declare module "htm" {
  const htm: { bind(create: unknown): (strings: TemplateStringsArray, ...values: unknown[]) => any };
  export default htm;
}
