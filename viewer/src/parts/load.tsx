import type { ComponentChildren, JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { messageOf } from "../data/errors";
import type { Resource } from "../state/resource";

/** Says so only when it takes long enough to wonder. */
function Waiting({ what }: { what: string }): JSX.Element {
  const [shown, show] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => show(true), 150);
    return () => clearTimeout(timer);
  }, []);
  return (
    <p class="waiting" role="status">
      {shown ? `Loading ${what} …` : ""}
    </p>
  );
}

/** A value once it is there; before, that it is being loaded, or what went wrong and how to try again. */
export function Load<T>(props: {
  of: Resource<T>;
  what: string;
  children: (value: T) => ComponentChildren;
}): JSX.Element {
  const { of, what, children } = props;
  if (of.error !== undefined)
    return (
      <div class="failed" role="alert">
        <p>
          Could not load {what}. {messageOf(of.error)}
        </p>
        <button onClick={of.retry}>Try again</button>
      </div>
    );
  if (of.value === undefined) return <Waiting what={what} />;
  return <>{children(of.value)}</>;
}
