type Where = "localStorage" | "sessionStorage";

/** What the browser has kept for later visits or for this session; nothing where it keeps nothing for this page. */
export function kept(where: Where, key: string): string | null {
  try {
    return window[where].getItem(key);
  } catch {
    return null;
  }
}

export function keep(where: Where, key: string, value: string): void {
  try {
    window[where].setItem(key, value);
  } catch {
    // It is asked or chosen again next time.
  }
}
