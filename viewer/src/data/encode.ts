import { DataError, isAbort, messageOf } from "./errors";
import { answerOf } from "./files";
import type { Encoded, Typed } from "../schemas";

/** A typed text's tokens and the atoms that fire on each, the most active first. */
export async function encode(typed: Typed, signal: AbortSignal): Promise<Encoded> {
  const headers = { "Content-Type": "application/json" };
  let response: Response;
  try {
    response = await fetch("api/encode", { method: "POST", headers, body: JSON.stringify(typed), signal });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new DataError(`The server cannot be reached (${messageOf(error)}). Is it still running?`, "unreachable");
  }
  if (!response.ok) throw new DataError(await answerOf(response), "broken");
  return (await response.json()) as Encoded;
}
