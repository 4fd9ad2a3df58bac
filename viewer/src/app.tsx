import type { JSX } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { siteFiles } from "./data/files";
import { JsonSource } from "./data/json";
import { SiteSource } from "./data/site";
import type { Source } from "./data/source";
import { Boundary } from "./parts/boundary";
import { Load } from "./parts/load";
import { hideTip, Tooltip } from "./parts/tooltip";
import type { Site } from "./schemas";
import { useKeys } from "./state/keys";
import { bestMatch, go, link, parse, replace, useRoute, type Route } from "./state/route";
import { useResource } from "./state/resource";
import { useTheme } from "./state/theme";
import { AtomPage, neighbour, type Place } from "./views/atom";
import { ComparePage } from "./views/compare";
import { DictionaryPage } from "./views/dictionary";
import { Help } from "./views/help";
import { ListPage } from "./views/list";
import { SentencePage } from "./views/sentence";
import { Warning } from "./views/warning";

const TRIES = 8;

function chooseSource(): Source {
  const prefix = new URLSearchParams(window.location.search).get("json");
  const files = siteFiles(document);
  return prefix === null ? new SiteSource(files) : new JsonSource(files, prefix.replace(/\/+$/, ""));
}

/** Some atom that fires; after a few that don't, any. */
async function lucky({ source, entry }: Place): Promise<number> {
  const { signal } = new AbortController();
  const { atoms: [first, last], picked = [] } = (await source.about(entry.path, signal)) ?? { atoms: [0, 0] };
  let atom = first;
  for (let tried = 0; tried < TRIES; tried += 1) {
    const place = Math.floor(Math.random() * (picked.length || last - first + 1));
    atom = picked[place] ?? first + place;
    const { n_active } = await source.page(entry.path, atom, signal);
    if (n_active > 0) break;
  }
  return atom;
}

function Bar({ place, site, onHelp }: { place: Place; site: Site; onHelp: () => void }): JSX.Element {
  const { source, route, entry } = place;
  const [theme, toggle] = useTheme();
  const views: [string, string][] = [
    ...(source.complete ? ([["atoms", "Atoms"], ["dictionary", "Dictionary"]] as [string, string][]) : []),
    ["compare", "Side by side"],
    ...(site.subject ? ([["sentence", "Type a sentence"]] as [string, string][]) : []),
  ];
  const other = (name: string): void => go(link(route.view, name, route.atom, route.view === "atoms" ? route.params : {}));
  return (
    <header class="bar-top">
      {site.autoencoders.length > 1 && route.view !== "compare" ? (
        <select aria-label="autoencoder" onChange={(event) => other(event.currentTarget.value)}>
          {site.autoencoders.map(({ name }) => (
            <option value={name} selected={name === entry.name}>
              {name}
            </option>
          ))}
        </select>
      ) : (
        <strong>{entry.name}</strong>
      )}
      <nav aria-label="Views">
        {views.map(([view, title]) => (
          <a key={view} href={link(view, view === "compare" ? null : entry.name)} aria-current={view === route.view ? "page" : undefined}>
            {title}
          </a>
        ))}
      </nav>
      <GoTo name={entry.name} />
      <button class="plain" onClick={() => void openLucky(place)} title="some atom that fires (r)">
        Feeling lucky
      </button>
      <span class="spring" />
      <button class="plain" onClick={toggle} aria-label={`change to the ${theme === "dark" ? "light" : "dark"} theme`}>
        {theme === "dark" ? "Light" : "Dark"}
      </button>
      <button class="plain" onClick={onHelp} aria-label="help" title="help (?)">
        ?
      </button>
    </header>
  );
}

function GoTo({ name }: { name: string }): JSX.Element {
  const submit = (event: SubmitEvent): void => {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    const atom = Number(new FormData(form).get("atom") || NaN);
    if (Number.isInteger(atom)) go(link("atom", name, atom));
    form.reset();
    // Else the next key would be typed there.
    form.querySelector("input")?.blur();
  };
  return (
    <form onSubmit={submit}>
      <input class="go-to" name="atom" inputMode="numeric" pattern="[0-9]{1,9}" placeholder="atom" aria-label="go to atom" />
    </form>
  );
}

/** An atom that cannot be read shows why on its own page. */
async function openLucky(place: Place): Promise<void> {
  const atom = await lucky(place).catch(() => 0);
  go(link("atom", place.entry.name, atom));
}

function View({ place, site }: { place: Place; site: Site }): JSX.Element {
  const { source, route } = place;
  if (route.view === "atom" && route.atom !== null) return <AtomPage {...place} />;
  if (route.view === "compare") return <ComparePage source={source} route={route} entries={site.autoencoders} />;
  if (route.view === "sentence" && site.subject) return <SentencePage {...place} />;
  if (route.view === "dictionary" && source.complete) return <DictionaryPage {...place} />;
  if (route.view === "atoms" && source.complete) return <ListPage {...place} />;
  if (route.view === "atoms") return <Start />;
  return (
    <main>
      <p class="failed">
        There is no such page. <a href={link("atoms", place.entry.name)}>All atoms of {place.entry.name}</a>
      </p>
    </main>
  );
}

function Start(): JSX.Element {
  return (
    <main>
      <p>These files hold atoms and no list of them: type the number of one above.</p>
    </main>
  );
}

/** Where a reference viewer's link leads here. */
function useReferenceLinks(route: Route, site: Site): void {
  useEffect(() => {
    if (route.view !== "model") return;
    const entry = bestMatch(site.autoencoders, route.name ?? "");
    if (entry) replace(route.atom === null ? link("atoms", entry.name) : link("atom", entry.name, route.atom));
  }, [route, site]);
}

function titleOf({ view, atom }: Route, name: string): string {
  return view === "atom" ? `Atom ${atom} of ${name}` : `${name}: ${view}`;
}

function Pages({ source, route, site }: { source: Source; route: Route; site: Site }): JSX.Element {
  const [helping, help] = useState(false);
  const named = site.autoencoders.find(({ name }) => name === route.name);
  const entry = named ?? site.autoencoders[0] ?? { name: "", path: "" };
  const place = { source, route, entry };
  const { view } = route;
  const step = (by: number) => async (): Promise<void> => {
    const about = await source.about(entry.path, new AbortController().signal).catch(() => null);
    // Not where the page is, but where the keys before this one have led.
    const at = parse(window.location.hash);
    if (at.view === "atom" && at.atom !== null) replaceOrGo(link("atom", entry.name, neighbour(about, at.atom, by), at.params));
  };
  useKeys({
    "?": () => help(true),
    r: () => void openLucky(place),
    ...(view === "atom" ? { j: () => void step(1)(), k: () => void step(-1)() } : {}),
    ...(view === "atoms" ? {} : { "/": () => source.complete && go(link("atoms", entry.name, null, { focus: "1" })) }),
  });
  useReferenceLinks(route, site);
  useEffect(() => {
    document.title = titleOf(route, entry.name);
    hideTip();
  }, [route, entry.name]);
  if (view === "model") return <main />;
  const unknown = route.name !== null && !named && view !== "compare";
  return (
    <>
      <Bar place={place} site={site} onHelp={() => help(true)} />
      <Boundary place={link(view, route.name, route.atom, route.params)}>
        {unknown ? <Unknown name={route.name ?? ""} site={site} /> : <View place={place} site={site} />}
      </Boundary>
      {helping && <Help close={() => help(false)} />}
    </>
  );
}

function Unknown({ name, site }: { name: string; site: Site }): JSX.Element {
  return (
    <main>
      <p class="failed">
        <span>
          There is no autoencoder <bdi>{name}</bdi> here:{" "}
          {site.autoencoders.map((entry) => (
            <a href={link("atoms", entry.name)}>{entry.name} </a>
          ))}
        </span>
      </p>
    </main>
  );
}

function replaceOrGo(hash: string): void {
  if (hash !== window.location.hash) go(hash);
}

export function App(): JSX.Element {
  const route = useRoute();
  const source = useMemo(chooseSource, []);
  const site = useResource("site", (signal) => source.site(signal));
  return (
    <>
      <Load of={site} what="the site">
        {(value) => (
          <Warning text={value.warning ?? null}>
            <Pages source={source} route={route} site={value} />
          </Warning>
        )}
      </Load>
      <Tooltip />
    </>
  );
}
