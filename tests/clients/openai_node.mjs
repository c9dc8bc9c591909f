import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI();
const ask = { model: process.env.MODEL, messages: [{ role: "user", content: "hi" }], max_tokens: 12, temperature: 0 };
const schema = { type: "object", properties: { mood: { enum: ["low", "ok"] } }, required: ["mood"], additionalProperties: false };
const whole = await client.chat.completions.create(ask);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) streamed += chunk.choices[0]?.delta?.content ?? "";
const shaped = await client.chat.completions.create({
  ...ask, max_tokens: 40, response_format: { type: "json_schema", json_schema: { name: "mood", schema, strict: true } },
});
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({
  version: VERSION, models, whole: whole.choices[0].message.content, streamed, structured: JSON.parse(shaped.choices[0].message.content),
}));
