import { parquetMetadata, parquetRead, parquetSchema, type AsyncBuffer, type FileMetaData } from "hyparquet";
import { COLUMNS, type Rows } from "../schemas";
import { DataError, isAbort, messageOf } from "./errors";
import type { Files, Piece } from "./files";

export type Columns<R> = { [C in keyof R]: ArrayLike<R[C]> };

// Room for the footer of a block of effects; one that is longer is asked for again.
const FOOTER = 24 * 1024;

/** A Parquet file whose footer has been read. */
export interface Table {
  path: string;
  metadata: FileMetaData;
  tail: Piece;
}

function footerLength(tail: Piece): number {
  const view = new DataView(tail.bytes);
  if (view.byteLength < 12) throw new Error("it is too short");
  return view.getUint32(view.byteLength - 8, true) + 8;
}

async function broken<T>(path: string, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (error) {
    if (isAbort(error) || error instanceof DataError) throw error;
    throw new DataError(`${path} is broken: ${messageOf(error)}`, "broken");
  }
}

function checkColumns(path: string, metadata: FileMetaData, table: keyof Rows): void {
  const found = new Set(parquetSchema(metadata).children.map((child) => child.element.name));
  const missing = COLUMNS[table].filter((name) => !found.has(name));
  if (missing.length) throw new DataError(`${path} lacks the columns ${missing.join(", ")}.`, "broken");
}

export function openTable(files: Files, path: string, table: keyof Rows, signal: AbortSignal): Promise<Table> {
  return broken(path, async () => {
    let tail = await files.tail(path, FOOTER, signal);
    const length = footerLength(tail);
    if (length > tail.bytes.byteLength && tail.start > 0) tail = await files.tail(path, length, signal);
    const metadata = parquetMetadata(tail.bytes);
    checkColumns(path, metadata, table);
    return { path, metadata, tail };
  });
}

function within(piece: Piece, start: number, end: number): ArrayBuffer | null {
  const first = start - piece.start;
  if (first < 0 || end - piece.start > piece.bytes.byteLength) return null;
  return piece.bytes.slice(first, end - piece.start);
}

function buffer(files: Files, table: Table, signal: AbortSignal): AsyncBuffer {
  return {
    byteLength: table.tail.size,
    slice: async (start, end = table.tail.size) => {
      const known = within(table.tail, start, end);
      if (known) return known;
      const piece = await files.slice(table.path, start, end, signal);
      if (piece.tag !== table.tail.tag) throw new DataError(`${table.path} has changed.`, "changed");
      const bytes = within(piece, start, end);
      if (!bytes) throw new Error(`it ends before byte ${end}`);
      return bytes;
    },
  };
}

/** Where row group `group` begins and ends, in rows; none where the file has no such group. */
function groupRows(metadata: FileMetaData, group: number): [number, number] {
  const counts = metadata.row_groups.map((one) => Number(one.num_rows));
  const start = counts.slice(0, group).reduce((sum, count) => sum + count, 0);
  return [start, start + (counts[group] ?? 0)];
}

/** Columns of one row group, empty where the file has no such group. */
export function readGroup<T extends keyof Rows, C extends keyof Rows[T] & string>(
  files: Files,
  table: Table,
  group: number,
  columns: readonly C[],
  signal: AbortSignal,
): Promise<Columns<Pick<Rows[T], C>>> {
  const read = Object.fromEntries(columns.map((name) => [name, [] as unknown[]])) as Record<C, unknown[]>;
  const [rowStart, rowEnd] = groupRows(table.metadata, group);
  return broken(table.path, async () => {
    if (rowEnd > rowStart) {
      await parquetRead({
        file: buffer(files, table, signal),
        metadata: table.metadata,
        columns: [...columns],
        rowStart,
        rowEnd,
        onChunk: ({ columnName, columnData }) => {
          const column = read[columnName as C];
          for (let row = 0; row < columnData.length; row += 1) column.push(columnData[row]);
        },
      });
    }
    const short = columns.find((name) => read[name].length !== rowEnd - rowStart);
    if (short) throw new Error(`column ${short} has ${read[short].length} rows of ${rowEnd - rowStart}`);
    return read as unknown as Columns<Pick<Rows[T], C>>;
  });
}

/** The rows of columns of one length. */
export function rows<R extends object>(columns: Columns<R>): R[] {
  const names = Object.keys(columns) as (keyof R)[];
  const length = names[0] === undefined ? 0 : columns[names[0]].length;
  return Array.from({ length }, (_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])) as R);
}
