import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

const MORE = 8;

interface VirtualProps {
  count: number;
  height: number;
  /** What the place in the list is remembered by. */
  name: string;
  /** The row to keep in sight. */
  selected: number | null;
  row: (index: number) => JSX.Element;
}

const places = new Map<string, number>();

/** A list of which only the rows in sight are elements. */
export function Virtual({ count, height, name, selected, row }: VirtualProps): JSX.Element {
  const box = useRef<HTMLDivElement>(null);
  const [view, setView] = useState({ top: 0, height: 800 });
  const measure = (): void => {
    if (!box.current) return;
    const { scrollTop, clientHeight } = box.current;
    places.set(name, scrollTop);
    setView({ top: scrollTop, height: clientHeight });
  };
  useLayoutEffect(() => {
    if (box.current) box.current.scrollTop = places.get(name) ?? 0;
    measure();
  }, [name]);
  useEffect(() => {
    window.addEventListener("resize", measure);
    return () => window.removeEventListener("resize", measure);
  }, []);
  useEffect(() => {
    if (selected === null || !box.current) return;
    const { scrollTop, clientHeight } = box.current;
    const top = selected * height;
    if (top < scrollTop) box.current.scrollTop = top;
    if (top + height > scrollTop + clientHeight) box.current.scrollTop = top + height - clientHeight;
  }, [selected]);
  const first = Math.max(0, Math.floor(view.top / height) - MORE);
  const last = Math.min(count, Math.ceil((view.top + view.height) / height) + MORE);
  return (
    <div ref={box} class="virtual" style={{ height: `${count * height}px` }} onScroll={measure} tabIndex={0} role="rowgroup">
      <div class="virtual-all" style={{ height: `${count * height}px` }}>
        <div class="virtual-shown" style={{ transform: `translateY(${first * height}px)` }}>
          {Array.from({ length: Math.max(0, last - first) }, (_, i) => row(first + i))}
        </div>
      </div>
    </div>
  );
}
