const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A number with `digits` significant digits, aligned figures and no needless zeros. */
export function figure(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return minus(PLAIN.format(value));
  if (size >= 1e6 || size < 1e-3) return minus(value.toExponential(Math.max(0, digits - 1)).replace("e+", "e"));
  return minus(value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.floor(Math.log10(size)) + 1) }));
}

function minus(text: string): string {
  return text.replaceAll("-", "−");
}

/** A share of tokens, as a percentage and as one in so many. */
export function oneIn(density: number): string {
  return density > 0 ? `1 in ${PLAIN.format(1 / density)} tokens` : "never";
}

export function percent(share: number, digits = 2): string {
  return `${figure(100 * share, digits)}%`;
}

/** A number among others in a column: the same decimals in each. */
export function fixed(value: number | null | undefined, decimals: number): string {
  return value === null || value === undefined || Number.isNaN(value) ? "–" : minus(value.toFixed(decimals));
}
