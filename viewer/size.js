// What a browser loads before any data, compressed: it has to stay small.
import { readFileSync, readdirSync } from "node:fs";
import { gzipSync } from "node:zlib";

const LIMIT = 80 * 1024;
const folder = new URL("../jobs/bundle/", import.meta.url);
const size = readdirSync(folder)
  .map((name) => gzipSync(readFileSync(new URL(name, folder))).length)
  .reduce((sum, bytes) => sum + bytes, 0);
console.log(`jobs/bundle: ${size} bytes gzipped, of ${LIMIT}`);
process.exitCode = size > LIMIT ? 1 : 0;
