import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { encode } from "../data/encode";
import { Load } from "../parts/load";
import { marked, short } from "../parts/marks";
import { fixed } from "../parts/number";
import { level } from "../parts/sequence";
import { leaveTip, showTip } from "../parts/tooltip";
import type { Encoded } from "../schemas";
import { change, go, link } from "../state/route";
import { useResource } from "../state/resource";
import type { Place } from "./atom";

const LISTED = 30;

interface Strongest {
  atom: number;
  act: number;
  position: number;
}

/** The atoms of a text by their largest activation in it. */
export function strongest({ atoms, acts }: Encoded): Strongest[] {
  const found = new Map<number, Strongest>();
  atoms.forEach((here, position) =>
    here.forEach((atom, i) => {
      const act = acts[position]?.[i] ?? 0;
      if (act > (found.get(atom)?.act ?? 0)) found.set(atom, { atom, act, position });
    }),
  );
  return [...found.values()].sort((one, other) => other.act - one.act);
}

function actOf({ atoms, acts }: Encoded, atom: number, position: number): number {
  return acts[position]?.[atoms[position]?.indexOf(atom) ?? -1] ?? 0;
}

function AtomLinks({ encoded, position, name }: { encoded: Encoded; position: number; name: string }): JSX.Element {
  return (
    <ol class="votes">
      {(encoded.atoms[position] ?? []).map((atom, i) => (
        <li>
          <a href={link("atom", name, atom)}>{atom}</a>
          <span class="number">{fixed(encoded.acts[position]?.[i], 2)}</span>
        </li>
      ))}
    </ol>
  );
}

function Result({ encoded, name }: { encoded: Encoded; name: string }): JSX.Element {
  const [token, chooseToken] = useState<number | null>(null);
  const [atom, chooseAtom] = useState<number | null>(null);
  const found = strongest(encoded);
  const most = atom === null ? (found[0]?.act ?? 0) : (found.find((one) => one.atom === atom)?.act ?? 0);
  const shown = (position: number): number => (atom === null ? (encoded.acts[position]?.[0] ?? 0) : actOf(encoded, atom, position));
  const tipOf = (position: number): JSX.Element => (
    <>
      <bdi class="token whole">{marked(encoded.tokens[position] ?? "")}</bdi>
      <AtomLinks encoded={encoded} position={position} name={name} />
    </>
  );
  return (
    <div class="sentence-result">
      <p class="sequence by-act large" onPointerLeave={leaveTip}>
        {encoded.tokens.map((text, position) => (
          <bdi
            class={`t${level("act", shown(position), most)}${position === token ? " peak" : ""}`}
            onPointerEnter={(event) => showTip(event.currentTarget, tipOf(position))}
            onClick={() => chooseToken(position === token ? null : position)}
          >
            {short(text)}
          </bdi>
        ))}
      </p>
      {encoded.atoms.some((here) => !here.length) && (
        <p class="quiet">Tokens without colour have no atoms: none fires there, or their position is masked, as in the lake.</p>
      )}
      <div class="pair">
        <section>
          <h3>Strongest atoms of the text</h3>
          <ol class="votes">
            {found.slice(0, LISTED).map((one) => (
              <li onPointerEnter={() => chooseAtom(one.atom)} onPointerLeave={() => chooseAtom(null)}>
                <a href={link("atom", name, one.atom)}>{one.atom}</a>
                <bdi class="token">{short(encoded.tokens[one.position] ?? "")}</bdi>
                <span class="number">{fixed(one.act, 2)}</span>
              </li>
            ))}
          </ol>
        </section>
        {token !== null && (
          <section>
            <h3>
              On <bdi class="token">{short(encoded.tokens[token] ?? "")}</bdi>
            </h3>
            <AtomLinks encoded={encoded} position={token} name={name} />
          </section>
        )}
      </div>
    </div>
  );
}

function Answer({ name, text }: { name: string; text: string }): JSX.Element {
  const answer = useResource(`encode ${name} ${text}`, (signal) => encode({ autoencoder: name, text }, signal));
  return (
    <Load of={answer} what="the atoms of this text">
      {(encoded) => <Result encoded={encoded} name={name} />}
    </Load>
  );
}

/** The atoms of a text that is typed here, from the subject that the server runs. */
export function SentencePage({ route, entry }: Place): JSX.Element {
  const text = route.params["text"] ?? "";
  const submit = (event: SubmitEvent): void => {
    event.preventDefault();
    const typed = new FormData(event.currentTarget as HTMLFormElement).get("text");
    if (typeof typed === "string") go(change(route, { text: typed }));
  };
  return (
    <main>
      <header class="title">
        <h1>
          <span class="quiet">{entry.name}</span> Type a sentence
        </h1>
      </header>
      <form class="typed" onSubmit={submit}>
        <textarea name="text" rows={3} aria-label="text" defaultValue={text} />
        <button>Show its atoms</button>
      </form>
      {text && <Answer name={entry.name} text={text} />}
    </main>
  );
}
