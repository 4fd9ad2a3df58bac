import type { JSX } from "preact";
import { useState } from "preact/hooks";

export interface Question {
  title: string;
  sql: string;
}

/** A button that copies a text; where the clipboard is closed it says so. */
export function Copy({ text, label = "Copy" }: { text: string; label?: string }): JSX.Element {
  const [said, say] = useState(label);
  const copy = async (): Promise<void> => {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied");
    } catch {
      say("Select and copy by hand");
    }
    setTimeout(() => say(label), 1500);
  };
  return (
    <button class="copy" onClick={() => void copy()}>
      {said}
    </button>
  );
}

/** What is shown, as questions to the lake: for sae sql LAKE "…". */
export function Sql({ questions }: { questions: Question[] }): JSX.Element {
  return (
    <details class="sql">
      <summary>SQL for this page</summary>
      <p class="quiet">
        For <code>sae sql LAKE "…"</code>, or a connection of <code>sae.jobs.lake.connect</code>.
      </p>
      {questions.map(({ title, sql }) => (
        <div class="question">
          <h4>{title}</h4>
          <Copy text={sql} />
          <pre>{sql}</pre>
        </div>
      ))}
    </details>
  );
}
