import type { ComponentChildren, JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

interface Tip {
  anchor: DOMRect;
  content: ComponentChildren;
}

let publish: (tip: Tip | null) => void = () => undefined;
let closing: ReturnType<typeof setTimeout> | undefined;

export function showTip(anchor: Element, content: ComponentChildren): void {
  clearTimeout(closing);
  publish({ anchor: anchor.getBoundingClientRect(), content });
}

/** Closes the tooltip soon, unless the pointer moves into it. */
export function hideTip(): void {
  clearTimeout(closing);
  closing = setTimeout(() => publish(null), 120);
}

type Handler = (event: Event) => void;

/** The handlers of an element that has a tooltip. */
export function tip(content: () => ComponentChildren): Record<"onPointerEnter" | "onFocus" | "onPointerLeave" | "onBlur", Handler> {
  const show: Handler = (event) => event.currentTarget instanceof Element && showTip(event.currentTarget, content());
  return { onPointerEnter: show, onFocus: show, onPointerLeave: leaveTip, onBlur: hideTip };
}

/** A finger leaves what it has touched at once: its tooltip stays until something else is touched. */
export function leaveTip(event: Event): void {
  if (!(event instanceof PointerEvent) || event.pointerType !== "touch") hideTip();
}

const GAP = 6;

/** The one tooltip of the page, below what it is about, above it where there is no room. */
export function Tooltip(): JSX.Element | null {
  const [shown, set] = useState<Tip | null>(null);
  const box = useRef<HTMLDivElement>(null);
  publish = set;
  useEffect(() => {
    const touch = (event: PointerEvent): void => {
      const inside = event.target instanceof Node && box.current?.contains(event.target);
      if (event.pointerType === "touch" && !inside) publish(null);
    };
    // Before the handlers of what is touched, which may show the next one.
    document.addEventListener("pointerover", touch, true);
    return () => document.removeEventListener("pointerover", touch, true);
  }, []);
  useLayoutEffect(() => {
    if (!box.current || !shown) return;
    const { width, height } = box.current.getBoundingClientRect();
    const below = shown.anchor.bottom + GAP;
    const top = below + height < window.innerHeight ? below : Math.max(GAP, shown.anchor.top - GAP - height);
    const left = Math.max(GAP, Math.min(shown.anchor.left, window.innerWidth - width - GAP));
    box.current.style.transform = `translate(${left}px, ${top}px)`;
  }, [shown]);
  if (!shown) return null;
  return (
    <div ref={box} class="tooltip" role="tooltip" onPointerEnter={() => clearTimeout(closing)} onPointerLeave={leaveTip}>
      {shown.content}
    </div>
  );
}
