import { EMBEDDED } from "../schemas";
import { DataError, isAbort, messageOf } from "./errors";

/** Some bytes of a file, from `start` on; `size` is that of the whole file, `tag` changes when the file does. */
export interface Piece {
  bytes: ArrayBuffer;
  start: number;
  size: number;
  tag: string | null;
}

/** Where a site's files are read from, by path relative to site.json. */
export interface Files {
  /** The last `length` bytes of a file, or more. */
  tail(path: string, length: number, signal: AbortSignal): Promise<Piece>;
  /** The bytes from `start` to before `end`, or more of the file. */
  slice(path: string, start: number, end: number, signal: AbortSignal): Promise<Piece>;
  whole(path: string, signal: AbortSignal): Promise<ArrayBuffer>;
}

/** A path as a URL: names may hold any letter, and no prefix leads to another host. */
function address(path: string): string {
  return path.split("/").map(encodeURIComponent).join("/");
}

async function request(path: string, range: string | null, signal: AbortSignal): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(address(path), { signal, headers: range ? { Range: `bytes=${range}` } : {} });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new DataError(`${path} cannot be reached (${messageOf(error)}). Is the server still running?`, "unreachable");
  }
  if (response.status === 404) throw new DataError(`There is no file ${path}.`, "missing");
  if (response.status === 416) throw new DataError(`${path} is shorter than its footer says.`, "broken");
  if (!response.ok) {
    throw new DataError(`${path}: the server answered ${await answerOf(response)}`, "broken");
  }
  return response;
}

/** What a server says that does not send what it was asked for. */
export async function answerOf(response: Response): Promise<string> {
  const [line = ""] = (await response.text()).split("\n", 1);
  return `${response.status}: ${line.slice(0, 300) || response.statusText}`;
}

async function piece(path: string, range: string, signal: AbortSignal): Promise<Piece> {
  const response = await request(path, range, signal);
  const bytes = await response.arrayBuffer();
  const tag = response.headers.get("ETag") ?? response.headers.get("Last-Modified");
  const place = /bytes (\d+)-\d+\/(\d+)/.exec(response.headers.get("Content-Range") ?? "");
  // A host that knows no ranges sends the whole file.
  if (response.status !== 206 || !place) return { bytes, start: 0, size: bytes.byteLength, tag };
  return { bytes, start: Number(place[1]), size: Number(place[2]), tag };
}

const overHttp: Files = {
  tail: (path, length, signal) => piece(path, `-${length}`, signal),
  slice: (path, start, end, signal) => piece(path, `${start}-${end - 1}`, signal),
  whole: async (path, signal) => (await request(path, null, signal)).arrayBuffer(),
};

function embedded(contents: Record<string, string>): Files {
  const whole = async (path: string): Promise<ArrayBuffer> => {
    const text = contents[path];
    if (text === undefined) throw new DataError(`This page holds no ${path}.`, "missing");
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
  };
  const all = async (path: string): Promise<Piece> => {
    const bytes = await whole(path);
    return { bytes, start: 0, size: bytes.byteLength, tag: null };
  };
  return { tail: all, slice: all, whole };
}

/** The files that the page holds itself, else those beside it. */
export function siteFiles(page: Document): Files {
  const element = page.getElementById(EMBEDDED);
  return element ? embedded(JSON.parse(element.textContent ?? "{}") as Record<string, string>) : overHttp;
}

export async function readJson<T>(files: Files, path: string, signal: AbortSignal): Promise<T> {
  const text = new TextDecoder().decode(await files.whole(path, signal));
  try {
    return JSON.parse(text) as T;
  } catch (error) {
    throw new DataError(`${path} is not JSON: ${messageOf(error)}`, "broken");
  }
}
