interface Entry {
  value: Promise<unknown>;
  control: AbortController;
  waiting: number;
  done: boolean;
}

function aborted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    const stop = (): void => reject(new DOMException("no longer wanted", "AbortError"));
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });
}

/** Results by key, the least recently used forgotten; who asks for the same at the same time shares one request,
 * which is stopped when nobody waits for it any more. */
export class Cache {
  private readonly entries = new Map<string, Entry>();

  constructor(private readonly limit: number) {}

  async get<T>(key: string, signal: AbortSignal, load: (signal: AbortSignal) => Promise<T>): Promise<T> {
    signal.throwIfAborted();
    const entry = this.entries.get(key) ?? this.start(key, load);
    this.entries.delete(key);
    this.entries.set(key, entry);
    entry.waiting += 1;
    try {
      return (await Promise.race([entry.value, aborted(signal)])) as T;
    } finally {
      entry.waiting -= 1;
      if (!entry.waiting && !entry.done) {
        entry.control.abort();
        this.drop(key, entry);
      }
    }
  }

  /** Forgets what keys that begin so have. */
  forget(prefix: string): void {
    for (const key of this.entries.keys()) if (key.startsWith(prefix)) this.entries.delete(key);
  }

  private start(key: string, load: (signal: AbortSignal) => Promise<unknown>): Entry {
    const control = new AbortController();
    const entry: Entry = { value: load(control.signal), control, waiting: 0, done: false };
    entry.value.then(
      () => {
        entry.done = true;
        this.trim();
      },
      () => {
        entry.done = true;
        this.drop(key, entry);
      },
    );
    return entry;
  }

  private drop(key: string, entry: Entry): void {
    if (this.entries.get(key) === entry) this.entries.delete(key);
  }

  private trim(): void {
    for (const [key, entry] of this.entries) {
      if (this.entries.size <= this.limit) return;
      if (entry.done && !entry.waiting) this.entries.delete(key);
    }
  }
}
