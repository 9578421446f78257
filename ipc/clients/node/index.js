/** A client of graphgen servers. README.md shows its use; index.d.ts has every option and field. */
export { Client } from "./src/client.js";
export { ConnectionError, GraphgenError, ProtocolError, RequestError } from "./src/errors.js";
