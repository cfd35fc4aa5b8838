interface ImportMetaEnv {
  /** Where the server is, with the namespace: `ws://localhost:8000/ws` when left out. */
  readonly VITE_KARNA_URL?: string;
}
