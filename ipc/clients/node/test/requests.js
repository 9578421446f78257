/** The same requests as the vectors and the plans of conversations have them, as options of this client. */

import { camelCase } from "../src/wire.js";

/** @param {Record<string, any>} fields of a `generate` */
export function optionsOf({ text, prompt_ids, prompt_u32, messages, sampling = {}, stream, echo_ids, ...rest }) {
  return {
    prompt: text ?? prompt_ids ?? (prompt_u32 && unpack(prompt_u32.bin)),
    messages: messages?.map(camelFields),
    tools: rest.tools,
    documents: rest.documents,
    chatTemplateKwargs: rest.chat_template_kwargs,
    tenant: rest.tenant,
    stream,
    echoIds: echo_ids,
    ...camelFields(sampling),
  };
}

function camelFields(fields) {
  return Object.fromEntries(Object.entries(fields).map(([field, value]) => [camelCase(field), value]));
}

function unpack(hex) {
  const bytes = Buffer.from(hex, "hex");
  return Uint32Array.from({ length: bytes.length / 4 }, (_, place) => bytes.readUInt32LE(4 * place));
}
