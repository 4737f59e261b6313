// A conversation with Ollama's own client: a line of stdin for each turn, "/new" for a new conversation.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { client, model } from "./block.mjs";

const system = { role: "system", content: "You look things up in notes." };
const tools = [
  {
    type: "function",
    function: {
      name: "read_notes",
      description: "Read a file.",
      parameters: { type: "object", properties: { path: { type: "string" } }, required: ["path"] },
    },
  },
];

async function answered(messages, streams) {
  if (!streams) {
    return (await client.chat({ model, messages, tools })).message;
  }
  const message = { role: "assistant", content: "" };
  for await (const part of await client.chat({ model, messages, tools, stream: true })) {
    message.content += part.message.content;
    if (part.message.tool_calls) {
      message.tool_calls = [...(message.tool_calls ?? []), ...part.message.tool_calls];
    }
  }
  return message;
}

let messages = [system];
for await (const line of createInterface({ input: process.stdin })) {
  if (line === "/new") {
    messages = [system];
    process.stdout.write('""\n');
    continue;
  }
  messages.push({ role: "user", content: line });
  let reply;
  do {
    reply = await answered(messages, messages.length > 2); // both ways, as programs do
    messages.push(reply);
    for (const call of reply.tool_calls ?? []) {
      const content = readFileSync(call.function.arguments.path, "utf-8");
      messages.push({ role: "tool", content, tool_name: call.function.name });
    }
  } while (reply.tool_calls?.length);
  process.stdout.write(`${JSON.stringify(reply.content)}\n`);
}
