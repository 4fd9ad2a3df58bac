import type { ComponentChildren, JSX } from "preact";
import { useState } from "preact/hooks";
import { keep, kept } from "../state/kept";

const KEY = "warned";

/** Asks once a session before it shows what a site warns of. */
export function Warning({ text, children }: { text: string | null; children: ComponentChildren }): JSX.Element {
  const [seen, see] = useState(() => text === null || kept("sessionStorage", KEY) === text);
  if (seen) return <>{children}</>;
  const accept = (): void => {
    keep("sessionStorage", KEY, text ?? "");
    see(true);
  };
  return (
    <main class="warning">
      <h1>Content warning</h1>
      <p>{text}</p>
      <button autofocus onClick={accept}>
        Continue
      </button>
    </main>
  );
}
