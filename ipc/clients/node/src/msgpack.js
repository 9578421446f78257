/**
 * Msgpack as GGP/1 wants it. Owns what the package leaves open: a JavaScript number does not tell 1 from 1.0, and the
 * package takes bytes that are no UTF-8 and refuses a key named __proto__. Called by wire.js.
 */

import { isUtf8 } from "node:buffer";
import { Decoder, encode } from "@msgpack/msgpack";

/** Nothing in the protocol is a longer list, and a length that lies must not allocate. */
const MAX_ITEMS = 2 ** 20;
const MAX_DEPTH = 32;

/** A number that was a float on the wire. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

/**
 * These methods are not in the package's published types, so its version is pinned, and the conformance vectors fail
 * when one of them is not called any more.
 */
class StrictDecoder extends Decoder {
  decodeUtf8String(byteLength, headerOffset) {
    const start = this.pos + headerOffset;
    const text = super.decodeUtf8String(byteLength, headerOffset);
    if (!isUtf8(this.bytes.subarray(start, start + byteLength))) throw new Error("a str is not UTF-8");
    return text === "__proto__" && this.stateIsMapKey() ? "(__proto__)" : text;
  }

  readF32() {
    return new Float(super.readF32());
  }

  readF64() {
    return new Float(super.readF64());
  }
}

const decoder = new StrictDecoder({
  maxArrayLength: MAX_ITEMS,
  maxMapLength: MAX_ITEMS,
  mapKeyConverter(key) {
    if (typeof key !== "string") throw new Error(`a key is not a str: ${key}`);
    return key;
  },
});

/**
 * One map and nothing behind it; floats as Float. Throws an Error for everything else.
 * @param {Uint8Array} bytes
 * @returns {Record<string, unknown>}
 */
export function decodeMap(bytes) {
  const value = decoder.decode(bytes);
  if (!isMap(value)) throw new Error("the second frame is no map");
  checkDepth(value);
  return value;
}

export function isMap(value) {
  return typeof value === "object" && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}

/**
 * `undefined` is left out; integers, BigInts too, are written as such.
 * @param {Record<string, unknown>} value
 * @returns {Uint8Array}
 */
export function encodeMap(value) {
  return encode(value, { ignoreUndefined: true });
}

/** Without recursion, which a bomb of nested lists would exhaust. */
function checkDepth(root) {
  let level = [root];
  for (let depth = 0; level.length > 0; depth++) {
    if (depth > MAX_DEPTH) throw new Error(`values are nested more than ${MAX_DEPTH} deep`);
    level = level.flatMap((value) => Object.values(value).filter(isContainer));
  }
}

function isContainer(value) {
  return Array.isArray(value) || isMap(value);
}
