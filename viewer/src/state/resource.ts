import { useCallback, useLayoutEffect, useState } from "preact/hooks";
import { isAbort } from "../data/errors";

/** What a page waits for: nothing yet, a value (perhaps not all of it), or what went wrong. */
export interface Resource<T> {
  value: T | undefined;
  error: unknown;
  retry: () => void;
}

type Loaded<T> = { key: string; value?: T; error?: unknown };

/** What `load` gives for `key`, loaded again when the key changes; requests that nobody waits for are aborted. */
export function useResource<T>(
  key: string,
  load: (signal: AbortSignal, progress: (value: T) => void) => Promise<T>,
): Resource<T> {
  const [loaded, set] = useState<Loaded<T>>({ key: "" });
  const [attempt, setAttempt] = useState(0);
  // Before the browser paints: what is in memory already is shown without an empty page in between.
  useLayoutEffect(() => {
    const control = new AbortController();
    // A value that grows is the same object each time: what holds it is new.
    const show = (value: T): void => {
      if (!control.signal.aborted) set({ key, value });
    };
    load(control.signal, show).then(show, (error: unknown) => {
      if (!control.signal.aborted && !isAbort(error)) set({ key, error });
    });
    return () => control.abort();
  }, [key, attempt]);
  const retry = useCallback(() => {
    set({ key: "" });
    setAttempt((before) => before + 1);
  }, []);
  const current = loaded.key === key ? loaded : undefined;
  return { value: current?.value, error: current?.error, retry };
}
