import { useEffect, useState } from "preact/hooks";
import { keep, kept } from "./kept";

type Theme = "light" | "dark";
const KEY = "theme";

function preferred(): Theme {
  const chosen = kept("localStorage", KEY);
  if (chosen === "light" || chosen === "dark") return chosen;
  return window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** The theme in force and a function that changes to the other one, for later visits as well. */
export function useTheme(): [Theme, () => void] {
  const [theme, set] = useState(preferred);
  useEffect(() => {
    document.documentElement.dataset["theme"] = theme;
  }, [theme]);
  const toggle = (): void => {
    const other = theme === "dark" ? "light" : "dark";
    keep("localStorage", KEY, other);
    set(other);
  };
  return [theme, toggle];
}
