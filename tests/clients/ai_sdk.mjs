import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { createRequire } from "node:module";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "counsel", baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY, supportsStructuredOutputs: true,
});
const ask = { model: provider(process.env.MODEL), prompt: "hi", maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
const whole = await generateText(ask);
let streamed = "";
for await (const part of streamText(ask).textStream) streamed += part;
const shaped = await generateText({ ...ask, maxOutputTokens: 40, output: Output.object({ schema: z.object({ mood: z.enum(["low", "ok"]) }) }) });
console.log(JSON.stringify({
  version: createRequire(import.meta.url)("ai/package.json").version, whole: whole.text, streamed, structured: shaped.output,
}));
