const LONGEST = 40;

// Letters that would be invisible or move what is beside them: shown by their code.
const INVISIBLE = /[\u0080-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f]/g;

function code(letter: string): string {
  return `‹U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
}

function picture(letter: string): string {
  const value = letter.charCodeAt(0);
  return String.fromCharCode(value === 0x7f ? 0x2421 : 0x2400 + value);
}

/** A token's text with marks in the place of what could not be seen. */
export function marked(token: string): string {
  if (token === "") return "∅";
  const seen = token
    .replace(/\r\n|\n|\r/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/\u00a0/g, "⍽")
    .replace(CONTROL, picture)
    .replace(INVISIBLE, code);
  return /^ +$/.test(seen) ? "␣".repeat(seen.length) : seen;
}

/** As marked, and no longer than fits a line. */
export function short(token: string): string {
  const text = marked(token);
  const letters = text.length > LONGEST ? [...text.slice(0, 2 * LONGEST + 2)] : [];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST).join("")}…` : text;
}
