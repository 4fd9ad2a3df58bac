import type { JSX } from "preact";

export interface Option {
  name: string;
  href: string;
  on: boolean;
}

/** One of several, each a link, so that it can be shared and gone back from. */
export function Choice({ label, options }: { label: string; options: Option[] }): JSX.Element {
  return (
    <nav class="choice" aria-label={label}>
      {options.map(({ name, href, on }) => (
        <a key={name} href={href} aria-current={on ? "true" : undefined}>
          {name}
        </a>
      ))}
    </nav>
  );
}
