import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";

const TYPES: Record<string, string> = {
  ".css": "text/css",
  ".html": "text/html",
  ".js": "text/javascript",
  ".json": "application/json",
  ".svg": "image/svg+xml",
};

/** Answers a request itself and returns true, or leaves it to the files. */
export type Answer = (path: string, request: IncomingMessage, response: ServerResponse) => boolean;

export interface Site {
  url: string;
  /** Bytes sent since it was last set to 0. */
  sent: number;
  asked: string[];
  answer: Answer;
  folders: string[];
  close: () => Promise<void>;
}

function range(header: string | undefined, size: number): [number, number] | null {
  const found = /^bytes=(\d*)-(\d*)$/.exec(header ?? "");
  if (!found) return null;
  const [, first = "", last = ""] = found;
  if (first === "") return [Math.max(0, size - Number(last)), size];
  return [Number(first), last === "" ? size : Math.min(size, Number(last) + 1)];
}

function send(file: string, request: IncomingMessage, response: ServerResponse, site: Site): void {
  const { size, mtimeMs } = statSync(file);
  const wanted = range(request.headers.range, size);
  const [start, end] = wanted ?? [0, size];
  response.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
  response.setHeader("ETag", `"${mtimeMs}"`);
  response.setHeader("Content-Length", end - start);
  if (wanted) response.setHeader("Content-Range", `bytes ${start}-${end - 1}/${size}`);
  response.writeHead(wanted ? 206 : 200);
  site.sent += end - start;
  createReadStream(file, { start, end: Math.max(start, end - 1) }).pipe(response);
}

/** Serves folders, the first that has a file, on a loopback port, as strictly as sae view does. */
export async function serve(...folders: string[]): Promise<Site> {
  const server: Server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url ?? "/", "http://localhost").pathname));
    site.asked.push(path);
    response.setHeader("Content-Security-Policy", "default-src 'self'");
    response.setHeader("Cache-Control", "no-store");
    if (site.answer(path, request, response)) return;
    const name = path === "/" ? "index.html" : path;
    const file = folders.map((folder) => join(folder, name)).find((candidate) => existsSync(candidate));
    if (file) return send(file, request, response, site);
    response.writeHead(404).end("no such file");
  });
  await new Promise<void>((ready) => server.listen(0, "127.0.0.1", ready));
  const { port } = server.address() as AddressInfo;
  const close = (): Promise<void> =>
    new Promise((done) => {
      server.close(() => done());
      server.closeAllConnections();
    });
  const site: Site = { url: `http://127.0.0.1:${port}/`, sent: 0, asked: [], answer: () => false, folders, close };
  return site;
}
