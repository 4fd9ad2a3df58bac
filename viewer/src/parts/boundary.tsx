import { Component, type ComponentChildren, type JSX } from "preact";
import { messageOf } from "../data/errors";

interface Props {
  /** Another one is another page, which is tried again. */
  place: string;
  children: ComponentChildren;
}

interface State {
  place: string;
  error: unknown;
}

/** A page that cannot be drawn says so; it is never blank. */
export class Boundary extends Component<Props, State> {
  override state: State = { place: this.props.place, error: undefined };

  static getDerivedStateFromProps(props: Props, state: State): State | null {
    return props.place === state.place ? null : { place: props.place, error: undefined };
  }

  override componentDidCatch(error: unknown): void {
    this.setState({ error });
  }

  override render(): JSX.Element {
    const { error } = this.state;
    if (error === undefined) return <>{this.props.children}</>;
    return (
      <main>
        <p class="failed" role="alert">
          This page cannot be shown: {messageOf(error)}
        </p>
      </main>
    );
  }
}
