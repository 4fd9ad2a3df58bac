import type { JSX } from "preact";
import { useEffect, useRef } from "preact/hooks";

const KEYS: [string, string][] = [
  ["j", "next atom, or next row of the list"],
  ["k", "previous atom, or previous row"],
  ["Enter", "open the row"],
  ["/", "search"],
  ["r", "some atom that fires"],
  ["?", "this help"],
];

/** What the keys do and what the colours mean. */
export function Help({ close }: { close: () => void }): JSX.Element {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => box.current?.showModal(), []);
  return (
    <dialog ref={box} class="help" onClose={close} aria-label="Help">
      <h2>Keys</h2>
      <dl class="facts">
        {KEYS.map(([key, meaning]) => (
          <>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{meaning}</dd>
          </>
        ))}
      </dl>
      <h2>Colours</h2>
      <p>
        <i class="t a8" /> how strongly the atom fires on a token; the outlined token is the one that an example was chosen
        for.
      </p>
      <p>
        <i class="t n8" /> without the atom, the model predicts this token worse: the atom helped. <i class="t p8" /> it
        predicts it better.
      </p>
      <p>Point at a token for its numbers and, where effects are known, for the tokens that the atom makes more or less likely there.</p>
      <h2>Marks</h2>
      <p>
        <bdi class="token">↵</bdi> new line <bdi class="token">⇥</bdi> tab <bdi class="token">␣</bdi> only spaces{" "}
        <bdi class="token">∅</bdi> an empty token <bdi class="token">‹U+200F›</bdi> a letter that cannot be seen
      </p>
      <form method="dialog">
        <button>Close</button>
      </form>
    </dialog>
  );
}
