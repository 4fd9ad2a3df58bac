import { Component, h, type ComponentType, type FunctionComponent, type VNode } from "preact";

/** A component that is drawn again only when one of its properties is another. */
export function memo<P extends object>(Inner: FunctionComponent<P>): ComponentType<P> {
  return class Memo extends Component<P> {
    override shouldComponentUpdate(next: P): boolean {
      const names = Object.keys(next) as (keyof P)[];
      return names.some((name) => next[name] !== this.props[name as keyof typeof this.props]);
    }
    override render(): VNode {
      return h(Inner as FunctionComponent<object>, this.props as P);
    }
  };
}
