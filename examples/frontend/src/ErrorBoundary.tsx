import { Component, type ReactNode } from 'react';

/** Shows what broke and a way back, instead of an empty page. */
export class ErrorBoundary extends Component<{ children: ReactNode }, { error: Error | null }> {
  override state: { error: Error | null } = { error: null };

  static getDerivedStateFromError(error: Error) {
    return { error };
  }

  override render() {
    const { error } = this.state;
    if (!error) return this.props.children;
    return (
      <main role="alert">
        <h1>This page broke</h1>
        <p>{error.message}</p>
        <button onClick={() => this.setState({ error: null })}>Try again</button>
      </main>
    );
  }
}
