import { useEffect, useState } from "preact/hooks";

/** The whole state of a page, as its link says it: #/view/autoencoder/atom?name=value. */
export interface Route {
  view: string;
  name: string | null;
  atom: number | null;
  params: Record<string, string>;
}

export type Params = Record<string, string | null>;

export function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function atomOf(text: string | undefined): number | null {
  return text !== undefined && /^\d{1,9}$/.test(text) ? Number(text) : null;
}

export function parse(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#?\/?/, "").split(/\?(.*)/s);
  const [view = "", ...parts] = path.split("/").map(decode);
  const params = Object.fromEntries(new URLSearchParams(query));
  // The reference viewer's links name a model, a family and its keys; the last value is the atom.
  if (view === "model") return { view, name: parts.slice(0, -1).join("/"), atom: atomOf(parts.at(-1)), params };
  return { view: view || "atoms", name: parts[0] || null, atom: atomOf(parts[1]), params };
}

export function link(view: string, name: string | null, atom: number | null = null, params: Params = {}): string {
  const path = [view, name, atom].filter((part) => part !== null).map((part) => encodeURIComponent(part));
  const said = Object.entries(params).filter((pair): pair is [string, string] => pair[1] !== null && pair[1] !== "");
  const query = new URLSearchParams(said).toString();
  return `#/${path.join("/")}${query ? `?${query}` : ""}`;
}

/** The same place with some parameters changed; null removes one. */
export function change(route: Route, params: Params): string {
  return link(route.view, route.name, route.atom, { ...route.params, ...params });
}

export function go(hash: string): void {
  window.location.hash = hash;
}

/** As go, but Back does not return to what was there. */
export function replace(hash: string): void {
  window.history.replaceState(null, "", hash);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

export function useRoute(): Route {
  const [route, set] = useState(() => parse(window.location.hash));
  useEffect(() => {
    const update = (): void => set(parse(window.location.hash));
    window.addEventListener("hashchange", update);
    return () => window.removeEventListener("hashchange", update);
  }, []);
  return route;
}

/** The entry whose name and path hold most of the words of a reference link, else the first. */
export function bestMatch<E extends { name: string; path: string }>(entries: E[], words: string): E | undefined {
  const wanted = words.toLowerCase().split("/");
  const score = ({ name, path }: E): number => {
    const text = `${name}/${path}`.toLowerCase();
    const parts = new Set(text.split(/[^a-z0-9]+/));
    return wanted.reduce((sum, word) => sum + (parts.has(word) ? 2 : word && text.includes(word) ? 1 : 0), 0);
  };
  return entries.reduce<E | undefined>((best, one) => (best && score(best) >= score(one) ? best : one), undefined);
}
