/** What went wrong with a file, in words for who looks at the page. */
export class DataError extends Error {
  constructor(
    message: string,
    readonly kind: "missing" | "broken" | "unreachable" | "changed",
  ) {
    super(message);
  }
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
