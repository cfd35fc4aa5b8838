import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

// The server lets pages of any localhost port in, so the page needs no proxy here.
export default defineConfig({
  plugins: [react()],
  server: { port: 5173 },
});
