// A conversation with the AI SDK: a line of stdin for each turn, "/new" for a new conversation.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { model } from "./block.mjs";

const readNotes = tool({
  description: "Read a file.",
  inputSchema: z.object({ path: z.string() }),
  execute: async ({ path }) => readFileSync(path, "utf-8"),
});
const options = {
  model,
  system: "You look things up in notes.",
  tools: { read_notes: readNotes },
  stopWhen: stepCountIs(5),
  maxRetries: 0,
};

let messages = [];
for await (const line of createInterface({ input: process.stdin })) {
  if (line === "/new") {
    messages = [];
    process.stdout.write('""\n');
    continue;
  }
  messages.push({ role: "user", content: line });
  const streams = messages.length > 1; // both ways, as programs do
  const result = streams ? streamText({ ...options, messages }) : await generateText({ ...options, messages });
  const text = await result.text;
  messages.push(...(await result.response).messages);
  process.stdout.write(`${JSON.stringify(text)}\n`);
}
